"""The error of each op against float64, beside PyTorch's own in the same dtype: `python -m benchmarks.numerics`.

Writes docs/numerics.md. Inputs are rounded to the dtype first, so that what is measured is the computation alone.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from panfpn_fast import ops

from . import inputs, peers
from .measuring import device_name

PAGE = Path(__file__).resolve().parents[1] / "docs" / "numerics.md"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = 32

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """An op and the same in plain PyTorch.

    Attributes:
        name: In the table.
        arguments: Makes float64 inputs.
        ours: Our op.
        pytorch: Eager PyTorch; run in float64 it is also the truth.
        share: Results are choices: the error is the share of them that differ.
    """

    name: str
    arguments: Callable[[], tuple[Any, ...]]
    ours: Function
    pytorch: Function
    share: bool = False


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _stage(channels: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """A map whose channels have means of their own, as convolutions give, and GroupNorm's parameters."""
    x = _random(1, channels, 26, 42) + _random(1, channels, 1, 1, seed=1)
    return x, 1 + 0.1 * _random(channels, seed=2), 0.1 * _random(channels, seed=3)


def _conv_stage() -> tuple[Tensor, ...]:
    weight = _random(64, 128, 3, 3, seed=4) / 34
    _, scale, shift = _stage()
    return _random(1, 128, 26, 42), weight, scale, shift


def _project_stage() -> tuple[Tensor, ...]:
    return *_conv_stage(), _random(54, 64, seed=5) / 8, 0.1 * _random(54, seed=6)


def _logits() -> tuple[Tensor]:
    return (3 * F.interpolate(_random(1, 54, 25, 42), scale_factor=2.0, mode="bilinear"),)


def _logits_and_target() -> tuple[Tensor, Tensor]:
    (logits,) = _logits()
    target = torch.randint(0, 54, (1, 200, 336), generator=torch.Generator().manual_seed(7))
    target[:, :20] = 255
    return logits, target


def _pooling() -> tuple[Tensor, Tensor]:
    boxes = F.pad(inputs.boxes(200, (200, 336)), (1, 0)).double()
    return _random(1, 64, 50, 84), boxes


def _gn_relu_upsample(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.interpolate(F.relu(F.group_norm(x, GROUPS, weight, bias)), scale_factor=2.0, mode="bilinear")


def _conv(x: Tensor, conv: Tensor) -> Tensor:
    return F.conv2d(x, conv, padding=1)


def _gradient(function: Function) -> Function:
    """The gradient for the first argument of a function."""

    def call(leaf: Tensor, *rest: Any) -> Tensor:
        leaf = leaf.detach().requires_grad_()
        output = function(leaf, *rest)
        seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
        return torch.autograd.grad(output, leaf, seed.to(output))[0]

    return call


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    upsampled = F.interpolate(logits, scale_factor=4.0, mode="bilinear")
    return F.cross_entropy(upsampled, target, ignore_index=255)


def _torchvision_roi_align(features: Tensor, boxes: Tensor) -> Tensor:
    pooled: Tensor = peers.torchvision_ops().roi_align(features, boxes, 7, 0.25, 2, True)
    return pooled


def _gn_case(name: str, wrap: Callable[[Function], Function]) -> Case:
    return Case(
        name,
        _stage,
        wrap(lambda x, weight, bias: ops.group_norm_relu_upsample(x, weight, bias, GROUPS)),
        wrap(_gn_relu_upsample),
    )


def _conv_case(name: str, wrap: Callable[[Function], Function]) -> Case:
    return Case(
        name,
        _conv_stage,
        wrap(lambda x, conv, weight, bias: ops.conv_gn_relu_upsample(x, conv, weight, bias, GROUPS)),
        wrap(lambda x, conv, weight, bias: _gn_relu_upsample(_conv(x, conv), weight, bias)),
    )


def _project_case(name: str, wrap: Callable[[Function], Function]) -> Case:
    return Case(
        name,
        _project_stage,
        wrap(lambda x, conv, *rest: ops.conv_gn_relu_project(x, conv, rest[0], rest[1], GROUPS, *rest[2:])),
        wrap(
            lambda x, conv, weight, bias, matrix, shift: F.conv2d(
                F.relu(F.group_norm(_conv(x, conv), GROUPS, weight, bias)), matrix[:, :, None, None], shift
            )
        ),
    )


def _forward(function: Function) -> Function:
    return function


def cases() -> list[Case]:
    """Every op whose result is rounded, and the labels of the arg max."""
    pairs: Sequence[tuple[str, Callable[[Function], Function]]] = (("", _forward), (", gradient", _gradient))
    table = []
    for suffix, wrap in pairs:
        table += [
            _gn_case(f"group_norm_relu_upsample{suffix}", wrap),
            _conv_case(f"conv_gn_relu_upsample{suffix}", wrap),
            _project_case(f"conv_gn_relu_project{suffix}", wrap),
            Case(
                f"upsample_cross_entropy{suffix}",
                _logits_and_target,
                wrap(lambda logits, target: ops.upsample_cross_entropy(logits, target, 4)),
                wrap(_cross_entropy),
            ),
        ]
        if peers.torchvision_problem(torch.device("cpu")) is None:
            pool = wrap(lambda features, boxes: ops.roi_align(features, boxes, 7, 0.25, 2, True))
            table.append(Case(f"roi_align{suffix}", _pooling, pool, wrap(_torchvision_roi_align)))
    table.append(
        Case(
            "upsample_argmax, share of other labels",
            _logits,
            lambda logits: ops.upsample_argmax(logits, 4),
            lambda logits: F.interpolate(logits, scale_factor=4.0, mode="bilinear").argmax(1),
            share=True,
        )
    )
    return sorted(table, key=lambda case: case.name)


def error(result: Tensor, truth: Tensor, share: bool) -> tuple[float, float]:
    """Root mean square and largest error, both over the truth's root mean square; or the share that differs."""
    if share:
        differing = float((result.long() != truth.long()).double().mean())
        return differing, differing
    difference = result.double() - truth
    size = float(truth.square().mean().sqrt())
    return float(difference.square().mean().sqrt()) / size, float(difference.abs().max()) / size


def _cast(arguments: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    def cast(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(device, dtype) if floating else leaf.to(device)

    return tree_map(cast, arguments)


def _cell(ours: tuple[float, float], theirs: tuple[float, float] | None, share: bool) -> str:
    if theirs is None:
        return f"{ours[0]:.1e}, {ours[1]:.1e} · not supported"
    if share:
        return f"{ours[0]:.1e} · {theirs[0]:.1e}"
    return f"{ours[0]:.1e}, {ours[1]:.1e} · {theirs[0]:.1e}, {theirs[1]:.1e}"


def row(case: Case, device: torch.device) -> str:
    """One line of the table."""
    cells = []
    for dtype in DTYPES:
        arguments = _cast(case.arguments(), dtype, device)
        truth = case.pytorch(*_cast(arguments, torch.float64, torch.device("cpu")))
        ours = error(case.ours(*arguments).cpu(), truth, case.share)
        try:
            theirs = error(case.pytorch(*arguments).cpu(), truth, case.share)
        except (RuntimeError, NotImplementedError):
            theirs = None  # a dtype that the peer does not take
        cells.append(_cell(ours, theirs, case.share))
    return f"| {case.name} | {' | '.join(cells)} |"


def page(device: torch.device) -> str:
    """The whole page in Markdown."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    lines = [
        "# Numerics",
        "",
        "How far each op is from the same computation in float64, beside eager PyTorch in the same dtype. Inputs are",
        "rounded to the dtype before, so that only the computation is compared. Each cell has the root mean square and",
        "the largest error, both relative to the root mean square of the exact result: ours · PyTorch's.",
        "",
        f"`python -m benchmarks.numerics` on {device_name(device)}, torch {torch.__version__},"
        f" {datetime.date.today().isoformat()}. `roi_align`'s peer is torchvision.",
        "",
        f"| op | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
        *(row(case, device) for case in cases()),
        "",
        "- Sums are accumulated in float32 for half types and rounded once at the end; PyTorch rounds after each of",
        "  the operations that one of ours stands for: hence its larger errors in half precision.",
        "- GroupNorm's statistics are combined as means and sums of squared deviations, never as sums of squares.",
        "- Bilinear weights of integer factors come from integer arithmetic, so they are exact up to one rounding.",
        "- `nms`, `paste_masks` and `panoptic_merge` return choices. Their docstrings say in which order of float32",
        "  operations a threshold is decided; tests allow another choice only within rounding of it.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    text = page(options.device)
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)


if __name__ == "__main__":
    main()
