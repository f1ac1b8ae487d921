"""Which clips there will be, in which shard and row each stands, and what encoding them will cost."""
