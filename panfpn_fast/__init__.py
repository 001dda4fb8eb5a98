"""Panoptic segmentation with hand-written kernels: fast ops, and a Panoptic FPN built from them.

    >>> import panfpn_fast
    >>> model = panfpn_fast.PanopticFPN.from_config("panoptic_fpn_r50")

`panfpn_fast.ops` has the single ops, `panfpn_fast.load` reads published checkpoints, `panfpn_fast.Predictor` turns
photographs into panoptic results, `panfpn_fast.patch("torchvision")` puts the ops into other people's models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from panfpn_fast import ops
    from panfpn_fast.checkpoints import load
    from panfpn_fast.inference import PanopticResult, Predictor, Segment
    from panfpn_fast.integrations import patch, patched, unpatch
    from panfpn_fast.models import PanopticFPN, PanopticFPNConfig

__all__ = [
    "PanopticFPN",
    "PanopticFPNConfig",
    "PanopticResult",
    "Predictor",
    "Segment",
    "__version__",
    "load",
    "ops",
    "patch",
    "patched",
    "unpatch",
]

# Where each public name lives. They are imported at their first use (PEP 562), so that the command line answers
# `--help` without waiting for torch.
_HOMES = {
    "PanopticFPN": "panfpn_fast.models",
    "PanopticFPNConfig": "panfpn_fast.models",
    "PanopticResult": "panfpn_fast.inference",
    "Predictor": "panfpn_fast.inference",
    "Segment": "panfpn_fast.inference",
    "load": "panfpn_fast.checkpoints",
    "patch": "panfpn_fast.integrations",
    "patched": "panfpn_fast.integrations",
    "unpatch": "panfpn_fast.integrations",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("panfpn_fast")
    if name == "ops":
        return importlib.import_module("panfpn_fast.ops")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'panfpn_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
