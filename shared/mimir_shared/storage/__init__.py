"""Where a cache lies, a folder or a bucket, and how files appear in it: whole, or not at all."""
