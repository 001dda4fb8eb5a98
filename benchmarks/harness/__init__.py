"""Shared parts of the benchmarks: declaring, checking, timing and counting; inputs and peers."""
