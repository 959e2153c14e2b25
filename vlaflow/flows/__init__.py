"""Paths, targets and solver steps: pure tensor mathematics, no network inside."""
