"""Prediction on images: `Predictor`, what it returns, and how results are drawn and saved."""

from __future__ import annotations

from panfpn_fast.inference.coco_format import CocoPanopticWriter, decode_panoptic, encode_panoptic
from panfpn_fast.inference.predictor import Predictor
from panfpn_fast.inference.preprocess import ImageReadError, read_image, resize_shortest_edge
from panfpn_fast.inference.result import Instances, PanopticResult, Segment

__all__ = [
    "CocoPanopticWriter",
    "ImageReadError",
    "Instances",
    "PanopticResult",
    "Predictor",
    "Segment",
    "decode_panoptic",
    "encode_panoptic",
    "read_image",
    "resize_shortest_edge",
]
