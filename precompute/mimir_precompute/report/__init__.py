"""`mimir-precompute report`: one HTML page on what a cache is, holds, and left out."""
