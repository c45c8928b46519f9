"""Ranks, the topology that a launch file sets up, and sharded parameters."""
