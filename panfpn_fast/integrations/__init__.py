"""Makes other frameworks use panfpn_fast ops: `panfpn_fast.patch("torchvision")`, and `unpatch` to undo it."""

from __future__ import annotations

from panfpn_fast.integrations.patching import Patch, patch, patched, unpatch

__all__ = ["Patch", "patch", "patched", "unpatch"]
