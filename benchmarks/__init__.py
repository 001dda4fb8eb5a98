"""Benchmarks of the ops against their peers; see README.md."""
