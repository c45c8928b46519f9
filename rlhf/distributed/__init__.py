"""Processes, what a launch file sets up, and sharded parameters."""
