"""Checks for every Triton op: it passes the samples of the op's tests, and it compiles without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from support.compile_kernels import LISTED, Launch
from support.machine_code import Loop
from support.op_checks import OPS, Sample, assert_agrees, channels_last, check_gradients

# Maximum bytes of shared memory per program, by compute capability (CUDA C++ Programming Guide, table of technical
# specifications).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Maximum bytes of spilled registers. Register allocation differs between versions of Triton. One or two values that are
# spilled outside the loops cost nothing; spills inside the loops are larger.
LARGEST_SPILL = 16
_TENSOR_CORES = ("mma.", "wgmma.mma", "tcgen05.mma")


@contextmanager
def implemented_in_triton(device: torch.device) -> Iterator[set[str]]:
    """Makes the Triton host functions the implementations of their ops on a device, in place of the C++ kernels.

    Yields:
        The names of the ops that have been called.
    """
    called = set()

    def counted(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            called.add(name)
            return implementation(*args)

        return call

    library = torch.library.Library("panfpn_fast", "IMPL")
    for name, implementation in importlib.import_module("panfpn_fast.ops.triton").IMPLEMENTATIONS.items():
        library.impl(name, counted(name, implementation), device.type.upper(), allow_override=True)
    try:
        yield called
    finally:
        library._destroy()


def op_samples(name: str, dtype: torch.dtype, device: torch.device) -> list[Sample]:
    """Returns the samples that the op's tests in tests/ops use for the C++ op."""
    path = Path(__file__).parents[1] / "ops" / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(f"samples_of_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    samples: list[Sample] = module.make_samples(dtype, device)
    return samples


def check_op(name: str, dtype: torch.dtype, device: torch.device, count: int | None = None) -> None:
    """Checks that the results in both layouts and all gradients equal those of the reference.

    The test must use the fixture `triton_ops`.

    Args:
        name: The op, as in `OPS`.
        dtype: Dtype of the samples.
        device: Device of the samples.
        count: Number of samples to check; None means all. The interpreter is slow, so a few suffice in half precision.
    """
    op = OPS[name]
    for sample in op_samples(name, dtype, device)[:count]:
        expected = sample.run(op.reference)
        for layout in (torch.Tensor.contiguous, channels_last):
            actual = sample.map_tensors(layout).run(op.function)
            assert_agrees(actual, expected, sample.tolerance, f"{name}, {layout.__name__}")
        check_gradients(op, sample)


def check_compiled(report: dict[str, Any], launch: Launch, capability: int) -> None:
    """Checks that hardly any register is spilled, shared memory suffices, and the right kernels use tensor cores."""
    assert report["kernels"], "no kernel was launched"
    for kernel in report["kernels"]:
        name, found = kernel["name"], kernel["targets"][str(capability)]
        assert found["spilled"] <= LARGEST_SPILL, name
        assert found["shared"] <= SHARED_MEMORY[capability], name
        on_tensor_cores = any(opcode.startswith(_TENSOR_CORES) for opcode in found["instructions"])
        assert on_tensor_cores == (name in launch.tensor_cores), name
    assert set(launch.tensor_cores) <= {kernel["name"] for kernel in report["kernels"]}


def check_traced(report: dict[str, Any]) -> None:
    """Checks that torch.compile sees every kernel of the call."""
    assert report["traced"] == len(report["kernels"])


def machine_code(report: dict[str, Any], kernel: str) -> tuple[Loop, list[Loop]]:
    """Returns the machine instructions of a kernel, and those of each of its loops by address."""
    (found,) = (k["targets"][str(LISTED)] for k in report["kernels"] if k["name"] == kernel)
    return Loop(Counter(found["machine"])), [Loop(Counter(instructions)) for instructions in found["loops"]]
