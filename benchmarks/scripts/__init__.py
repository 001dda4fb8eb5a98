"""Commands around the benchmarks: `python -m benchmarks.scripts.<name>`."""
