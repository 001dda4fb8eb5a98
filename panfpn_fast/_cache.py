"""Where the package keeps what it downloads and measures."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Returns the folder: ``$PANFPN_CACHE``, else ``$XDG_CACHE_HOME/panfpn_fast``."""
    own = os.environ.get("PANFPN_CACHE")
    if own:
        return Path(own).expanduser()
    # The XDG specification: unset, empty and relative values count as ~/.cache.
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "panfpn_fast"
