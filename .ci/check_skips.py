"""Fails when a test was skipped for a reason that CI does not expect: a skip must not hide a missing dependency."""

from __future__ import annotations

import re
import sys
from xml.etree import ElementTree

EXPECTED = (
    r"torch finds no CUDA GPU here",
    r"float64 is for the CPU",
    r"shared .* is not there|no shared folder",  # outside the founders' own machines
)


def main() -> int:
    unexpected = []
    skips = 0
    for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
        for skipped in case.iter("skipped"):
            skips += 1
            reason = skipped.get("message", "")
            if not any(re.search(pattern, reason) for pattern in EXPECTED):
                unexpected.append(f"{case.get('classname')}::{case.get('name')}: {reason}")
    print(f"{skips} skips, {len(unexpected)} of them unexpected")
    print("\n".join(unexpected))
    return 1 if unexpected else 0


sys.exit(main())
