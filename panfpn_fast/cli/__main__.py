"""Runs the command line as `python -m panfpn_fast.cli`, the form that torchrun needs."""

from __future__ import annotations

import sys

from panfpn_fast.cli.main import main

sys.exit(main())
