"""The binaries that are installed here load and compute in another torch.

PANFPN_OTHER_PYTHON names the interpreter of an environment with that torch: the same Python version, with numpy,
pillow and tqdm. CI makes one with torch 2.11, the oldest supported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

import panfpn_fast
from panfpn_fast import _load

OTHER_PYTHON = os.environ.get("PANFPN_OTHER_PYTHON")

# Each op once against its reference, by the code of the installed package in the other environment.
SCRIPT = """
import json, torch
from panfpn_fast import _load, ops
from panfpn_fast.ops import reference

random = torch.Generator().manual_seed(0)
corner = torch.rand(40, 2, generator=random) * 50
boxes = torch.cat([corner, corner + 20], dim=1)
scores, idxs = torch.rand(40, generator=random), torch.arange(40) % 3
maps = [torch.rand(1, 4, 32, 32, generator=random), torch.rand(1, 4, 16, 16, generator=random)]
masks, semantic = torch.rand(40, 28, 28, generator=random), torch.arange(64 * 64).reshape(64, 64) // 1024
calls = {
    "roi_align": (maps[0], [boxes], 7, 0.5),
    "multiscale_roi_align": (maps, [boxes], 7, (1 / 2, 1 / 4)),
    "nms": (boxes, scores, 0.5),
    "batched_nms": (boxes, scores, idxs, 0.5),
    "paste_masks": (masks, boxes, (64, 64)),
    "panoptic_merge": (masks, boxes, scores, idxs, semantic, (64, 64)),
}
for name, args in calls.items():
    torch.testing.assert_close(getattr(ops, name)(*args), getattr(reference, name)(*args))
compiled = torch.compile(ops.nms, fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(boxes, scores, 0.5), ops.nms(boxes, scores, 0.5))
print(json.dumps({**_load.build_report(), "ops": list(calls)}))
"""


@pytest.mark.skipif(
    not OTHER_PYTHON,
    reason="PANFPN_OTHER_PYTHON does not name a Python with another torch to load the binaries in",
)
def test_the_same_binaries_in_another_torch(tmp_path: Path) -> None:
    assert OTHER_PYTHON is not None
    # Only our own package is lent, not the site-packages that it lies in, which has this environment's torch.
    package = Path(panfpn_fast.__file__).parent
    site_packages = Path(str(distribution("panfpn_fast").locate_file("")))
    metadata = site_packages / f"panfpn_fast-{panfpn_fast.__version__}.dist-info"
    (tmp_path / "panfpn_fast").symlink_to(package)
    (tmp_path / metadata.name).symlink_to(metadata)
    result = subprocess.run(
        [OTHER_PYTHON, "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    print(
        f"built against torch {_load.build_report()['torch headers']}, run in {report['torch']}: {report['ops']}"
    )
    assert report["torch"] != torch.__version__
    assert report["CPU ops"] == "loaded"
    if report["torch CUDA"] != "none" and (package / "_C_cuda.so").exists():
        assert report["CUDA ops"] == "loaded", "the CUDA library must load without a GPU too"


def test_this_python_has_a_supported_torch() -> None:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    assert (major, minor) >= (2, 11), sys.version
