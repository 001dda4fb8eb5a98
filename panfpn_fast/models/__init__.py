"""The network: thin modules around the project's own ops."""

from __future__ import annotations

from panfpn_fast.models.config import PanopticFPNConfig, get_preset, presets
from panfpn_fast.models.panoptic_fpn import PanopticFPN, PanopticOutput
from panfpn_fast.models.two_networks import TwoNetworks, merge_outputs

__all__ = [
    "PanopticFPN",
    "PanopticFPNConfig",
    "PanopticOutput",
    "TwoNetworks",
    "get_preset",
    "merge_outputs",
    "presets",
]
