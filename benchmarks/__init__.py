"""Benchmarks of the ops and networks against their peers; see README.md."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]

# `python -m` puts this checkout first on the path. After `pip install .` the checkout's panfpn_fast has no binaries, so
# the installed package must be imported instead.
if not any((_ROOT / "panfpn_fast").glob("_C.*so")):
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _ROOT]
