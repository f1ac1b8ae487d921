"""A world small enough for a CPU: synthetic captioned clips, and tiny models in the real classes' formats."""
