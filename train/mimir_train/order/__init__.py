"""Which clips a step sees: pure functions of seed, epoch and number."""
