"""From the bytes of a clip to the pixels of its bucket, in child processes that a bad clip cannot hurt."""
