"""Benchmarks of single ops, `test_<op>.py` each."""
