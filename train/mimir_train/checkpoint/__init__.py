"""Checkpoints: what is in them, how they are written while steps go on, and how a run goes on from one."""
