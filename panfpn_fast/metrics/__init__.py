"""Metrics of the quality of panoptic predictions."""

from __future__ import annotations

from panfpn_fast.metrics.panoptic_quality import PanopticQuality, match_segments, pq_compute
from panfpn_fast.metrics.semantic import SemanticQuality

__all__ = ["PanopticQuality", "SemanticQuality", "match_segments", "pq_compute"]
