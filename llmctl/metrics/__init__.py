"""Metrics as quotients of sums, and task scores."""
