"""Benchmarks of the ops against their peers; see README.md."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]

# `python -m` puts this checkout first on the path. After `pip install .` its panfpn_fast has no binaries: the installed
# one is meant.
if not any((_ROOT / "panfpn_fast").glob("_C.*")):
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _ROOT]
