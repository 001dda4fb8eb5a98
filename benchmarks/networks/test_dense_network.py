"""The dense part of a prediction, compared with the engines that run it on a CPU.

It is the part with static shapes: backbone, FPN, the RPN's convolutions and the semantic head up to its logits. All
contenders have the same weights and the same normalised image, and compute in the same dtype. ONNX Runtime and OpenVINO
get the eager network, with batch norms folded, exported to ONNX.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from panfpn_fast.models import PanopticFPN, PanopticFPNConfig
from panfpn_fast.models.conv_fusion import for_prediction

from ..harness import engines, inputs, peers
from ..harness.agreement import close_norm
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row, nbytes, to_device
from ..harness.flops import Boxes, network_flops
from ..harness.measuring import bfloat16_problem
from .dense import Dense
from .eager_network import EagerPanopticFPN
from .engine_network import dense
from .stand_in import stand_in

Outputs = tuple[Tensor, ...]

_BACKBONE = "resnet50"


@cache
def _our_network(device: torch.device, dtype: torch.dtype) -> Dense:
    """Returns the dense part of the network that a `Predictor` runs."""
    return Dense(for_prediction(stand_in(_BACKBONE, device, dtype)))


@cache
def _eager_network(device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format) -> Dense:
    return Dense(stand_in(_BACKBONE, device, dtype, kind=EagerPanopticFPN, memory_format=memory_format))


def _floats(outputs: Outputs) -> Outputs:
    """Converts results to float32, the dtype that the engines return."""
    return tuple(output.float() for output in outputs)


@torch.no_grad()
def _ours(images: Tensor) -> Outputs:
    images = images.contiguous(memory_format=torch.channels_last)
    return _floats(_our_network(images.device, images.dtype)(images))


def _eager(memory_format: torch.memory_format) -> Callable[[Tensor], Outputs]:
    @torch.no_grad()
    def call(images: Tensor) -> Outputs:
        images = images.contiguous(memory_format=memory_format)
        return _floats(_eager_network(images.device, images.dtype, memory_format)(images))

    return call


@cache
def _compiled_network(device: torch.device, dtype: torch.dtype) -> Callable[..., Outputs]:
    return peers.compiled(_eager_network(device, dtype, torch.channels_last))


@torch.no_grad()
def _compiled(images: Tensor) -> Outputs:
    images = images.contiguous(memory_format=torch.channels_last)
    return _floats(_compiled_network(images.device, images.dtype)(images))


def _engine(name: str, images: Tensor) -> Outputs:
    return dense(name, _BACKBONE, tuple(images.shape), images.dtype)(images.float())


def _arguments(dtype: torch.dtype) -> Arguments:
    config = PanopticFPNConfig(backbone=_BACKBONE)
    with torch.device("meta"):
        network = PanopticFPN.from_config(config)
    image = network.normalize(inputs.image(inputs.PADDED))
    return (image[None].to(dtype),)


def _weights(images: Tensor) -> list[Tensor]:
    """Returns the weights of the dense part, in the dtype of the images."""
    network = _our_network(images.device, images.dtype).network
    parts = (network.backbone, network.fpn, network.rpn, network.semantic_head)
    return [weight for part in parts for weight in part.parameters()]


def _cost(arguments: Arguments, outputs: Outputs) -> Cost:
    config = PanopticFPNConfig(backbone=_BACKBONE)
    height, width = arguments[0].shape[2:]
    flops = network_flops(config, (height, width), Boxes(), commuted=False)
    weights = nbytes(_weights(arguments[0]))
    return Cost(bytes=nbytes(arguments) + weights + nbytes(outputs), flops=sum(flops.values()))


def _peers(dtype: torch.dtype) -> list[Peer]:
    return [
        Peer("eager", _eager(torch.contiguous_format)),
        Peer("eager, channels-last", _eager(torch.channels_last), full=True),
        Peer("torch.compile", _compiled, peers.compile_problem, full=True),
        *(
            Peer(name, partial(_engine, name), partial(engines.problem, name, dtype=dtype))
            for name in engines.NAMES
        ),
    ]


FLOAT = Comparison(
    op="dense network",
    ours=_ours,
    peers=_peers(torch.float32),
    cases=[Case("R-50, 800 x 1344, float32", partial(_arguments, torch.float32), highlight=True)],
    # Sums in another order, through fifty layers. A wrong layer gives a difference of about 1.
    agree=close_norm(1e-3),
    cost=_cost,
)

# bfloat16 has eight bits, and each engine rounds after other operations.
HALF = Comparison(
    op="dense network, half precision",
    ours=_ours,
    peers=_peers(torch.bfloat16),
    cases=[Case("R-50, 800 x 1344, bfloat16", partial(_arguments, torch.bfloat16))],
    agree=close_norm(0.1),
    cost=_cost,
    devices=("cuda",) if bfloat16_problem(torch.device("cpu")) else ("cpu", "cuda"),
)


def _note(row: Row, benchmark: Any) -> None:
    """Records the number of the weights, which are the same for all contenders."""
    [images] = to_device(row.case.arguments(), row.device)
    benchmark.extra_info["parameters"] = sum(weight.numel() for weight in _weights(images))


@FLOAT.rows()
def test_dense_network(row: Row, time_row: Callable[[Row], None], benchmark: Any) -> None:
    time_row(row)
    _note(row, benchmark)


@HALF.rows()
def test_dense_network_half(row: Row, time_row: Callable[[Row], None], benchmark: Any) -> None:
    time_row(row)
    _note(row, benchmark)
