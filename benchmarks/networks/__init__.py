"""Benchmarks of backbones, heads and whole networks."""
