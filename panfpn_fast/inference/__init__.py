"""Predicts panoptic segmentations of images, and draws and saves the results."""

from __future__ import annotations

from panfpn_fast.data.coco_ids import decode_panoptic, encode_panoptic
from panfpn_fast.data.images import ImageReadError, read_image, resize_shortest_edge
from panfpn_fast.inference.batch_predictor import BatchPredictor
from panfpn_fast.inference.coco_writer import CocoPanopticWriter
from panfpn_fast.inference.folder import predict_folder
from panfpn_fast.inference.map_files import find_maps, write_maps
from panfpn_fast.inference.predict_to_folder import PredictToFolder
from panfpn_fast.inference.predictor import Predictor, predict
from panfpn_fast.inference.result import Instances, PanopticResult
from panfpn_fast.inference.segment import Segment
from panfpn_fast.inference.sources import read_frames

__all__ = [
    "BatchPredictor",
    "CocoPanopticWriter",
    "ImageReadError",
    "Instances",
    "PanopticResult",
    "PredictToFolder",
    "Predictor",
    "Segment",
    "decode_panoptic",
    "encode_panoptic",
    "find_maps",
    "predict",
    "predict_folder",
    "read_frames",
    "read_image",
    "resize_shortest_edge",
    "write_maps",
]
