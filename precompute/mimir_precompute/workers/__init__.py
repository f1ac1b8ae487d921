"""What workers that share a cache know of each other: leases, signs of life, progress of all."""
