"""Fails when a test was skipped for a reason that CI does not expect: a skip must not hide a missing dependency."""

from __future__ import annotations

import re
import sys
from xml.etree import ElementTree

EXPECTED = (
    r"torch finds no CUDA GPU here",
    r"float64 is for the CPU",
    r"the configuration is for other GPUs",  # a Triton configuration on the GPUs that it is not for
    r"setup.py is not beside tests/",  # .ci/run keeps the package's sources away from the tests
    r"timm is not installed",  # of optional backbones, torchvision's are tested
    r"detectron2 is not installed",  # neither is on PyPI for every torch; what replaces them is tested without
    r"mmdetection is not installed",
    r"holds no goldens",  # PANFPN_SHARED is not everywhere
)


def main() -> int:
    """Reads pytest's junit.xml, named by the first argument."""
    unexpected = []
    skips = 0
    for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
        for skipped in case.iter("skipped"):
            skips += 1
            reason = skipped.get("message", "")
            if not any(re.search(pattern, reason) for pattern in EXPECTED):
                unexpected.append(f"{case.get('classname')}::{case.get('name')}: {reason}")
    names = {case.get("name", "").split("[")[0] for case in ElementTree.parse(sys.argv[1]).iter("testcase")}
    # These must not get lost: what they show cannot be seen on one torch, or without the kernels' sources.
    needed = {
        "test_the_same_binaries_in_another_torch",
        "test_no_unstable_symbols",
        "test_kernels_agree_with_the_reference",
    }
    unexpected += [f"{name}: was not collected" for name in sorted(needed - names)]
    print(f"{skips} skips, {len(unexpected)} of them unexpected")
    print("\n".join(unexpected))
    return 1 if unexpected else 0


sys.exit(main())
