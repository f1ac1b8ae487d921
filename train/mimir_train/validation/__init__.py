"""Clips that are held out: their loss, and samples from their text."""
