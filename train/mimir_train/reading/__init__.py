"""Batches out of a cache: read ahead by threads into memory that is used again."""
