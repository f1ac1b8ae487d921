"""Who starts workers, and where: processes beside this one, tasks of Slurm, actors of Ray."""
