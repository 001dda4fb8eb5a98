"""Our ops inside of other people's frameworks: `panfpn_fast.patch("torchvision")` and how to take it back."""

from __future__ import annotations

from panfpn_fast.integrations.patching import Patch, patch, patched, unpatch

__all__ = ["Patch", "patch", "patched", "unpatch"]
