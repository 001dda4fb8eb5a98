"""Fails if an op has become slower relative to its peers: `check_ratios.py RESULTS_JSON`.

minimal_ratios.json holds the least ratio of a peer's time to our time: the median over interleaved rounds. Each ratio
is at most half of the ratio measured on an idle machine, so that a busy machine passes but an op that has lost its
vectorisation fails. `pytest benchmarks --benchmark-only --only-guarded` measures these ratios.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MINIMAL = Path(__file__).with_name("minimal_ratios.json")


def failures(results: dict[str, Any], minimal: dict[str, dict[str, float]]) -> list[str]:
    """Returns a line for each ratio that is too small or was not measured.

    Args:
        results: The JSON written by pytest-benchmark.
        minimal: The least ratio to each peer, by benchmark group.
    """
    measured: dict[str, dict[str, float]] = {
        row["group"]: row["extra_info"]["ratio_to"]
        for row in results["benchmarks"]
        if row["name"] == "ours" and "ratio_to" in row["extra_info"]
    }
    found = []
    for group, peers in minimal.items():
        for peer, least in peers.items():
            ratio = measured.get(group, {}).get(peer)
            if ratio is None:
                found.append(f"{group}: was not measured together with {peer}")
            elif not ratio >= least:
                found.append(f"{group}: {ratio:.2f} times as fast as {peer}, expected at least {least}")
    return found


def main() -> int:
    """Checks the results file that the first argument names; returns the exit code."""
    minimal = json.loads(MINIMAL.read_text())
    found = failures(json.loads(Path(sys.argv[1]).read_text()), minimal)
    print(f"{sum(map(len, minimal.values()))} ratios, {len(found)} of them too small or missing")
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
