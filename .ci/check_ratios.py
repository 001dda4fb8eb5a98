"""Fails when an op has become slower in comparison with its peers: `check_ratios.py RESULTS_JSON`.

minimal_ratios.json says how many times as fast as a peer an op must at least be, in the same run on the same machine;
each figure is at most half of what an idle machine measured, so that a busy one passes and an op that has lost its
vectorisation does not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MINIMAL = Path(__file__).with_name("minimal_ratios.json")


def failures(results: dict[str, Any], minimal: dict[str, dict[str, float]]) -> list[str]:
    """Lines for the ratios that are too small, and for those that were not measured.

    Args:
        results: The JSON of pytest-benchmark.
        minimal: The least ratio to each peer, by the benchmark's group.
    """
    measured: dict[str, dict[str, float]] = {
        row["group"]: row["extra_info"]["ratio_to"]
        for row in results["benchmarks"]
        if "ratio_to" in row["extra_info"]
    }
    found = []
    for group, peers in minimal.items():
        for peer, least in peers.items():
            ratio = measured.get(group, {}).get(peer)
            if ratio is None:
                found.append(f"{group}: was not measured beside {peer}")
            elif not ratio >= least:
                found.append(f"{group}: {ratio:.2f} times as fast as {peer}, at least {least} is expected")
    return found


def main() -> int:
    """Reads the results named by the first argument."""
    minimal = json.loads(MINIMAL.read_text())
    found = failures(json.loads(Path(sys.argv[1]).read_text()), minimal)
    print(f"{sum(map(len, minimal.values()))} ratios, {len(found)} of them too small or missing")
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
