"""Writes tables and plots from the JSON of a benchmark run: `python -m benchmarks.scripts.report`."""
