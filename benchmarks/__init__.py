"""Comparative benchmarks: each folder has a runner, committed results and their tables."""
