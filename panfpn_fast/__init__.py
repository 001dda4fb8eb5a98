"""Panoptic segmentation with hand-written kernels: fast ops, and a Panoptic FPN built from them.

    >>> import panfpn_fast
    >>> model = panfpn_fast.PanopticFPN.from_config("panoptic_fpn_r50")

`panfpn_fast.ops` has the single ops, `panfpn_fast.load` reads published checkpoints, `panfpn_fast.Predictor` turns
photographs into panoptic results.
"""

from __future__ import annotations

from importlib.metadata import version

from panfpn_fast import ops
from panfpn_fast.checkpoints import load
from panfpn_fast.inference import PanopticResult, Predictor, Segment
from panfpn_fast.models import PanopticFPN, PanopticFPNConfig

__version__ = version("panfpn_fast")

__all__ = [
    "PanopticFPN",
    "PanopticFPNConfig",
    "PanopticResult",
    "Predictor",
    "Segment",
    "__version__",
    "load",
    "ops",
]
