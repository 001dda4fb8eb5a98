"""Helpers that several tests share; tests import them as `support.<module>`."""
