"""The installed version."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """Returns the installed package's version, or "(not installed)" when run from a source tree."""
    try:
        return metadata.version("panfpn_fast")
    except metadata.PackageNotFoundError:
        return "(not installed)"
