"""The network: thin modules around the ops of this package."""

from __future__ import annotations

from panfpn_fast.models.config import PanopticFPNConfig, get_preset, presets
from panfpn_fast.models.outputs import PanopticOutput
from panfpn_fast.models.panoptic_fpn import PanopticFPN
from panfpn_fast.models.tuning import load_tuning, tune
from panfpn_fast.models.two_networks import TwoNetworks, merge_outputs

__all__ = [
    "PanopticFPN",
    "PanopticFPNConfig",
    "PanopticOutput",
    "TwoNetworks",
    "get_preset",
    "load_tuning",
    "merge_outputs",
    "presets",
    "tune",
]
