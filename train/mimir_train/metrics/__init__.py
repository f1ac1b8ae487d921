"""What a run tells of its steps, and to whom."""
