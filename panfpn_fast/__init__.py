"""Panoptic segmentation with hand-written kernels: fast ops, and a Panoptic FPN built from them.

    >>> import panfpn_fast
    >>> model = panfpn_fast.PanopticFPN.from_config("panoptic_fpn_r50")

`panfpn_fast.ops` contains the single ops. `panfpn_fast.load` reads checkpoints and `panfpn_fast.save` writes them.
`panfpn_fast.Predictor` turns photographs into panoptic results, and `panfpn_fast.predict` does so in one call.
`panfpn_fast.export` makes a program of a network, and `panfpn_fast.metrics` measures its quality.
`panfpn_fast.patch("torchvision")` makes another framework use the ops. `panfpn_fast.tune` measures which convolutions
are fastest on a GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from panfpn_fast import metrics, ops
    from panfpn_fast.checkpoints import load, save
    from panfpn_fast.inference import PanopticResult, Predictor, Segment, predict
    from panfpn_fast.inference.export import export
    from panfpn_fast.integrations import patch, patched, unpatch
    from panfpn_fast.models import PanopticFPN, PanopticFPNConfig, load_tuning, tune

__all__ = [
    "PanopticFPN",
    "PanopticFPNConfig",
    "PanopticResult",
    "Predictor",
    "Segment",
    "__version__",
    "export",
    "load",
    "load_tuning",
    "metrics",
    "ops",
    "patch",
    "patched",
    "predict",
    "save",
    "tune",
    "unpatch",
]

# The network of predictions that name no other. Here, because `--help` shows it without importing torch.
DEFAULT_WEIGHTS = "detectron2://COCO-PanopticSegmentation/panoptic_fpn_R_50_3x"

# Where each public name lives. They are imported at their first use (PEP 562), so that the command line answers
# `--help` without waiting for torch.
_HOMES = {
    "PanopticFPN": "panfpn_fast.models",
    "PanopticFPNConfig": "panfpn_fast.models",
    "PanopticResult": "panfpn_fast.inference",
    "Predictor": "panfpn_fast.inference",
    "Segment": "panfpn_fast.inference",
    "export": "panfpn_fast.inference.export",
    "load": "panfpn_fast.checkpoints",
    "load_tuning": "panfpn_fast.models",
    "patch": "panfpn_fast.integrations",
    "patched": "panfpn_fast.integrations",
    "predict": "panfpn_fast.inference",
    "save": "panfpn_fast.checkpoints",
    "tune": "panfpn_fast.models",
    "unpatch": "panfpn_fast.integrations",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from panfpn_fast._version import version

        return version()
    if name in ("metrics", "ops"):
        return importlib.import_module(f"panfpn_fast.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'panfpn_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
