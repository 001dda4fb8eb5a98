"""What every Triton op goes through: the samples of its op's tests, and compilation for GPUs that need not be there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from compile_kernels import Launch
from op_checks import OPS, Sample, assert_agrees, channels_last, check_gradients

# Shared memory that a program may have, by compute capability: CUDA C++ Programming Guide, table of technical
# specifications.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Bytes. Register allocation differs between versions of Triton, and a value or two that wait outside of the loops cost
# nothing; what spills inside of them spills more.
LARGEST_SPILL = 16
_TENSOR_CORES = ("mma.", "wgmma.mma", "tcgen05.mma")


def op_samples(name: str, dtype: torch.dtype, device: torch.device) -> list[Sample]:
    """The samples with which the op's own tests check the C++ op."""
    path = Path(__file__).parent / "ops" / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(f"samples_of_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    samples: list[Sample] = module.make_samples(dtype, device)
    return samples


def check_op(name: str, dtype: torch.dtype, device: torch.device, count: int | None = None) -> None:
    """Forward, in both layouts, and every gradient equal the reference's; to be run under the fixture triton_ops.

    Of half precision the first few samples (`count`) do: the interpreter is slow.
    """
    op = OPS[name]
    for sample in op_samples(name, dtype, device)[:count]:
        expected = sample.run(op.reference)
        for layout in (torch.Tensor.contiguous, channels_last):
            actual = sample.map_tensors(layout).run(op.function)
            assert_agrees(actual, expected, sample.tolerance, f"{name}, {layout.__name__}")
        check_gradients(op, sample)


def check_compiled(report: dict[str, Any], launch: Launch, capability: int) -> None:
    """Next to nothing spills, shared memory suffices, and what should run on the tensor cores does."""
    assert report["kernels"], "no kernel was launched"
    for kernel in report["kernels"]:
        name, found = kernel["name"], kernel["targets"][str(capability)]
        assert found["spilled"] <= LARGEST_SPILL, name
        assert found["shared"] <= SHARED_MEMORY[capability], name
        on_tensor_cores = any(opcode.startswith(_TENSOR_CORES) for opcode in found["instructions"])
        assert on_tensor_cores == (name in launch.tensor_cores), name
    assert set(launch.tensor_cores) <= {kernel["name"] for kernel in report["kernels"]}


def check_traced(report: dict[str, Any]) -> None:
    """torch.compile sees every kernel of the call."""
    assert report["traced"] == len(report["kernels"])
