"""Runs all tests of training in one thread."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def small_workloads(one_thread: None) -> None:
    """Uses the shared fixture in each test of this folder."""
