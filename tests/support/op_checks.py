"""The checks that every op of the package must pass: `run_op_checks(op, samples)`.

Each op is listed once, in `OPS`. tests/ops/test_namespace.py fails if an op of the dispatcher is missing there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map

import panfpn_fast.ops
from panfpn_fast.ops import reference

# A thresholded output may differ from the reference if the value is this close to the threshold. Two correct float32
# evaluations of a bilinear sample in [0, 1] (with and without fused multiply-add) differ by less.
FLIP_MARGIN = 1e-5

# An input with a larger share of undecided output elements tests too little.
LARGEST_UNDECIDED_SHARE = 0.02


@dataclass(frozen=True)
class Op:
    """An op under test.

    Attributes:
        name: Name of the public function, of the dispatcher op and of the reference.
        differentiable: Names of the arguments that have gradients.
        host_result: Whether the function returns Python objects, which graphs cannot contain.
        calls: The dispatcher ops that the function and its backward call for every sample; None means `name` and, if
            the op is differentiable, `<name>_backward`.
        sometimes: The dispatcher ops that it calls only for some dtypes or on some machines.
        autocast: Whether the function contains a convolution or a matrix product, and so computes in autocast's dtype.
        cuda_in_csrc: Whether its CUDA kernels are in csrc (tests/cuda_on_host), and not in Triton (tests/kernels) or in
            torch.
    """

    name: str
    differentiable: tuple[str, ...] = ()
    host_result: bool = False
    calls: tuple[str, ...] | None = None
    sometimes: tuple[str, ...] = ()
    autocast: bool = False
    cuda_in_csrc: bool = True

    @property
    def dispatcher_ops(self) -> set[str]:
        """The dispatcher ops that the function and its backward may call."""
        own = {self.name, f"{self.name}_backward"} if self.differentiable else {self.name}
        return set(self.sometimes) | (own if self.calls is None else set(self.calls))

    @property
    def function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(panfpn_fast.ops, self.name)
        return function

    @property
    def reference(self) -> Callable[..., Any]:
        twin: Callable[..., Any] = getattr(reference, self.name)
        return twin


_GROUP_NORM_CALLS = ("group_norm_relu_upsample", "group_norm_relu_upsample_backward")

OPS = {
    op.name: op
    for op in (
        Op("roi_align", differentiable=("input",)),
        Op("multiscale_roi_align", differentiable=("features",)),
        Op(
            "conv3x3",
            differentiable=("x", "weight", "bias", "residual"),
            calls=(),
            sometimes=("conv3x3", "conv3x3_prepare", "conv3x3_prepared", "conv3x3_weight_gradient"),
            autocast=True,
            cuda_in_csrc=False,
        ),
        Op(
            "conv_gn_relu_project",
            differentiable=("x", "conv_weight", "gn_weight", "gn_bias", "weight", "bias", "residual"),
            calls=(
                "conv3x3_statistics",
                *_GROUP_NORM_CALLS,
                "bilinear_upsample_backward",
                "group_norm_relu_project",
            ),
            sometimes=("conv3x3", "conv3x3_weight_gradient"),
            autocast=True,
            cuda_in_csrc=False,
        ),
        Op(
            "conv_gn_relu_upsample",
            differentiable=("x", "conv_weight", "gn_weight", "gn_bias"),
            calls=("conv3x3_statistics", *_GROUP_NORM_CALLS),
            sometimes=("conv3x3", "conv3x3_weight_gradient"),
            autocast=True,
            cuda_in_csrc=False,
        ),
        Op(
            "group_norm_relu_upsample",
            differentiable=("x", "weight", "bias", "residual"),
            calls=("group_norm_statistics", *_GROUP_NORM_CALLS),
            cuda_in_csrc=False,
        ),
        Op("nms"),
        Op("batched_nms", sometimes=("nms",)),
        Op("nms_padded"),
        Op("paste_masks"),
        Op("paste_masks_rle", host_result=True),
        Op("panoptic_merge"),
        Op("panoptic_merge_padded"),
        Op("upsample_argmax", cuda_in_csrc=False),
        Op("upsample_cross_entropy", differentiable=("logits",), cuda_in_csrc=False),
    )
}


@dataclass(frozen=True)
class Tolerance:
    """How much the op may differ from its reference, and why.

    Attributes:
        reason: Why the results may differ.
        absolute: Allowed absolute difference, see torch.testing.assert_close.
        relative: Allowed difference relative to the expected value.
        undecided: Mask of the output elements that may have any value, for outputs that are thresholded; or None.
    """

    reason: str
    absolute: float = 0.0
    relative: float = 0.0
    undecided: Tensor | None = None


EXACT = Tolerance("The result is a choice or a copy of the input.")


def averaging_tolerance(dtype: torch.dtype) -> Tolerance:
    """Tolerance for weighted means of values of order one, accumulated in float32 (float64) and rounded to `dtype`."""
    if dtype == torch.float64:
        return Tolerance("About 100 float64 rounding errors of values up to 4.", 1e-13, 1e-13)
    summed = "Terms in a different order, and coordinates up to 64 px rounded to 4e-6 px where neighbours differ by 4."
    if dtype == torch.float32:
        return Tolerance(summed, 2e-5, 1e-5)
    one_step = torch.finfo(dtype).eps
    return Tolerance(f"{summed} Rounding to {dtype} turns this into one step.", 2e-5, one_step)


@dataclass(frozen=True)
class Sample:
    """Arguments for the public function and the reference, and how closely their results must agree."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    tolerance: Tolerance = EXACT

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Sample:
        args, kwargs = tree_map(
            lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        return Sample(args, kwargs, self.tolerance)

    def run(self, function: Callable[..., Any]) -> Any:
        return function(*self.args, **self.kwargs)

    def static_key(self) -> str:
        """Key of everything except sizes and integers; torch.compile needs one graph per key."""
        leaves, tree = tree_flatten((self.args, self.kwargs))
        kinds = [(leaf.dtype, leaf.ndim) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return str((tree, ["int" if type(kind) is int else kind for kind in kinds]))

    def sizes(self) -> list[int]:
        """All tensor sizes and integer arguments."""
        integers = [leaf for leaf in tree_leaves((self.args, self.kwargs)) if type(leaf) is int]
        return integers + [size for tensor in self.tensors() for size in tensor.shape]

    def coincidences(self) -> int:
        """Number of sizes that repeat another size; Dynamo treats equal sizes as the same size."""
        return len(self.sizes()) - len(set(self.sizes()))


def assert_agrees(actual: Any, expected: Any, tolerance: Tolerance, context: str) -> None:
    """Compares the tensors in two results, including their shapes, dtypes and devices."""
    actual_leaves, actual_tree = tree_flatten(actual)
    expected_leaves, expected_tree = tree_flatten(expected)
    assert actual_tree == expected_tree, f"{context}: {actual_tree} instead of {expected_tree}"
    for position, (got, wanted) in enumerate(zip(actual_leaves, expected_leaves, strict=True)):
        if isinstance(wanted, bytes):
            assert got == wanted, f"{context}, output {position}: {got!r} instead of {wanted!r}"
            continue
        undecided = tolerance.undecided
        if undecided is not None and got.shape == wanted.shape == undecided.shape:
            assert undecided.sum() <= LARGEST_UNDECIDED_SHARE * undecided.numel(), (
                f"{context}: too many undecided elements"
            )
            got = torch.where(undecided, wanted, got)

        def message(difference: str, position: int = position) -> str:
            return f"{context}, output {position}:\n{difference}\nTolerance: {tolerance.reason}"

        torch.testing.assert_close(
            got,
            wanted,
            atol=tolerance.absolute,
            rtol=tolerance.relative,
            equal_nan=True,
            msg=message,
        )


def strided(tensor: Tensor) -> Tensor:
    """Returns the same values with a stride of two, an offset of one, and other values in between."""
    other = torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else torch.ones_like(tensor)
    return torch.stack([other, tensor], dim=-1)[..., 1]


def channels_last(tensor: Tensor) -> Tensor:
    """Returns a tensor of four dimensions in channels-last layout, and any other tensor unchanged."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


class _RecordCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the calls of the package's dispatcher ops with their arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "panfpn_fast":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def check_coverage(samples: Sequence[Sample]) -> None:
    """Checks that the samples include an empty input and an odd size."""
    tensors = [tensor for sample in samples for tensor in sample.tensors()]
    assert any(tensor.numel() == 0 for tensor in tensors), "no sample has an empty input"
    assert any(tensor.ndim > 0 and tensor.shape[-1] % 2 and tensor.shape[-1] > 1 for tensor in tensors), (
        "no sample has an odd size"
    )


def check_forward(op: Op, sample: Sample) -> None:
    """Checks that the op equals its reference for all layouts of its inputs and under autocast."""
    expected = sample.run(op.reference)
    assert_agrees(sample.run(op.function), expected, sample.tolerance, f"{op.name}, contiguous")
    for layout in (strided, channels_last):
        actual = sample.map_tensors(layout).run(op.function)
        assert_agrees(actual, expected, sample.tolerance, f"{op.name}, {layout.__name__}")
    device = sample.tensors()[0].device.type
    tolerance = sample.tolerance
    if op.autocast and sample.tensors()[0].dtype != torch.float64:  # autocast does not affect float64
        expected = tree_map(lambda leaf: leaf.to(torch.bfloat16), expected)
        tolerance = Tolerance(
            "Inputs, weights and the result of the convolution are each rounded to bfloat16.", 0.1, 0.05
        )
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_agrees(sample.run(op.function), expected, tolerance, f"{op.name}, autocast")


def _differentiable(op: Op, bound: dict[str, Any]) -> tuple[list[Tensor], TreeSpec]:
    """Returns copies of the given differentiable arguments, and the tree structure to reassemble them."""
    given = {name: bound[name] for name in op.differentiable if bound.get(name) is not None}
    leaves, tree = tree_flatten(given)
    return [leaf.detach().clone().requires_grad_() for leaf in leaves], tree


def check_gradients(op: Op, sample: Sample) -> None:
    """Checks that gradients equal those of the reference and, in float64, numerical gradients."""
    if not op.differentiable:
        return
    bound = inspect.signature(op.function).bind(*sample.args, **sample.kwargs).arguments
    leaves, tree = _differentiable(op, bound)

    def gradients(function: Callable[..., Any]) -> Sequence[Tensor]:
        output = function(**{**bound, **tree.unflatten(leaves)})
        weights = torch.rand(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return torch.autograd.grad(output, leaves, weights.to(output))

    context = f"{op.name}, gradient"
    assert_agrees(gradients(op.function), gradients(op.reference), sample.tolerance, context)
    if all(leaf.dtype == torch.float64 for leaf in leaves):
        torch.autograd.gradcheck(
            lambda *inputs: op.function(**{**bound, **tree.unflatten(inputs)}), leaves, fast_mode=True
        )


def check_dispatcher_ops(op: Op, sample: Sample) -> set[str]:
    """Runs torch.library.opcheck on all dispatcher calls of the op and its backward; returns the names of the ops."""
    bound = inspect.signature(op.function).bind(*sample.args, **sample.kwargs).arguments
    leaves, tree = _differentiable(op, bound)
    with _RecordCalls() as record:
        output = op.function(**{**bound, **tree.unflatten(leaves)})
        if op.differentiable:
            torch.autograd.grad(output, leaves, torch.ones_like(output))
    for func, args, kwargs in record.calls:
        if str(func).split(".")[1].endswith("_backward"):  # a backward op rejects differentiation
            args, kwargs = tree_map(
                lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs)
            )
        torch.library.opcheck(func, args, kwargs)
    return {str(func).split(".")[1] for func, _, _ in record.calls}


def check_compiled(op: Op, samples: Sequence[Sample]) -> None:
    """Checks that torch.compile makes a full graph with dynamic sizes that serves samples of several sizes."""
    by_key = sorted(samples, key=Sample.static_key)
    for _, members in groupby(by_key, key=Sample.static_key):
        # Dynamo must recompile for a size of 0 or 1, and if sizes differ that were equal in the first sample. So the
        # sample with the fewest equal sizes comes first, and one graph must serve all other samples without 0 or 1.
        group = sorted(members, key=Sample.coincidences)
        limit = 1 + sum(0 in sample.sizes() or 1 in sample.sizes() for sample in group)
        torch._dynamo.reset()
        # aot_eager includes tracing, fakes and functionalisation, and needs neither gcc nor Triton.
        compiled = torch.compile(op.function, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
            for sample in group:
                assert_agrees(
                    sample.run(compiled), sample.run(op.reference), sample.tolerance, f"{op.name}, compiled"
                )
    torch._dynamo.reset()


class _Call(torch.nn.Module):
    """Wraps a function in a module, as torch.export requires."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def check_exported(op: Op, sample: Sample) -> None:
    """Checks that torch.export creates a program with the same result."""
    program = torch.export.export(_Call(op.function), sample.args, sample.kwargs)
    assert_agrees(
        sample.run(program.module()), sample.run(op.reference), sample.tolerance, f"{op.name}, exported"
    )


def run_op_checks(op: Op, samples: Sequence[Sample]) -> None:
    """Runs the checks that apply to all ops.

    Args:
        op: The op, from `OPS`.
        samples: Inputs on one device, including an empty one and one with an odd size.
    """
    check_coverage(samples)
    called: set[str] = set()
    for sample in samples:
        check_forward(op, sample)
        check_gradients(op, sample)
        called |= check_dispatcher_ops(op, sample)
    if samples[0].tensors()[0].device.type == "cpu":  # on CUDA, Triton replaces some ops
        assert op.dispatcher_ops - set(op.sometimes) <= called <= op.dispatcher_ops
    # The graph is the same for all dtypes, and compiling takes longer than all other checks.
    traced = [sample for sample in samples if sample.tensors()[0].dtype == torch.float32]
    if traced and not op.host_result:
        check_compiled(op, traced)
        check_exported(op, traced[0])
