"""What is said of a cache by reading it alone: its state, its values, its damage, one clip, two caches."""
