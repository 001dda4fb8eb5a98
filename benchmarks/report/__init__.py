"""Tables and plots from the JSON of a benchmark run: `python -m benchmarks.report`."""
