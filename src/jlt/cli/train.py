"""`jlt train`."""
