"""Predicts panoptic segmentations of images, and draws and saves the results."""

from __future__ import annotations

from panfpn_fast.data.coco_ids import decode_panoptic, encode_panoptic
from panfpn_fast.data.images import ImageReadError, read_image, resize_shortest_edge
from panfpn_fast.inference.coco_writer import CocoPanopticWriter
from panfpn_fast.inference.folder import predict_folder
from panfpn_fast.inference.predictor import Predictor, predict
from panfpn_fast.inference.result import Instances, PanopticResult
from panfpn_fast.inference.segment import Segment
from panfpn_fast.inference.sources import read_frames

__all__ = [
    "CocoPanopticWriter",
    "ImageReadError",
    "Instances",
    "PanopticResult",
    "Predictor",
    "Segment",
    "decode_panoptic",
    "encode_panoptic",
    "predict",
    "predict_folder",
    "read_frames",
    "read_image",
    "resize_shortest_edge",
]
