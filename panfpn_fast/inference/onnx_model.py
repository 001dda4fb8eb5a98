"""Converts a network to an ONNX model. Importing this module needs onnx and onnxscript."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx
import torch
from torch.export import Dim, ExportedProgram

from panfpn_fast import ops
from panfpn_fast.inference.onnx_ops import OPSET, translations
from panfpn_fast.models.config import FPN_STRIDES
from panfpn_fast.models.padded import PaddedPanopticFPN

_ANY_SIZE = (192, 256)
"""Size of the images that are traced for images of any size: no side of a feature map is 1, which would be fixed."""


def trace(network: PaddedPanopticFPN, size: tuple[int, int] | None, batch: int) -> ExportedProgram:
    """Traces a network on the CPU, where convolutions are torch's.

    Args:
        network: The network, on any device.
        size: Height and width of the images; None for any.
        batch: Number of images.

    Returns:
        The program, whose outputs are those of the network.
    """
    if network.model.device.type != "cpu":
        network = copy.deepcopy(network).cpu()
    images = torch.zeros(batch, 3, *(size or _ANY_SIZE), dtype=torch.uint8)
    varying = None if size else ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    with torch.no_grad(), ops.winograd(False):
        return torch.export.export(network, (images,), strict=False, dynamic_shapes=varying)


def convert(
    network: PaddedPanopticFPN,
    size: tuple[int, int] | None,
    program: ExportedProgram,
    outputs: Sequence[str],
    metadata: Mapping[str, str],
) -> bytes:
    """Converts a traced network.

    Args:
        network: The network.
        size: Height and width of the images; None for any.
        program: The result of `trace`.
        outputs: Names of the outputs.
        metadata: Properties of the model.

    Returns:
        The content of an ONNX file.
    """
    config = network.model.config
    # NMS has a group for each class, or for each level of the pyramid.
    groups, resampled = max(config.num_things, len(FPN_STRIDES)), network.output_size not in (None, size)
    with _quiet():
        found = torch.onnx.export(
            program,
            custom_translation_table=translations(groups, resampled),
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(outputs),
            dynamic_shapes=({2: "height", 3: "width"},) if size is None else None,
            dynamo=True,
            verbose=False,
        )
    assert found is not None
    model = found.model_proto
    _remove_notes(model.graph)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    content: bytes = model.SerializeToString()
    return content


def _remove_notes(graph: onnx.GraphProto) -> None:
    """Removes what torch's exporter notes about the origin of each value, such as paths of this machine."""
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _remove_notes(attribute.g)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings about steps of the conversion and optimizations that were left out; failures are errors."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
