"""Poisons fresh memory in every op test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.poison import poisoned


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """See `poison.poisoned`."""
    with poisoned():
        yield
