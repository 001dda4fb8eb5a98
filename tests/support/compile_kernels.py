"""Compiles the kernels that a test file lists in LAUNCHES, without a GPU, and prints a report.

    PYTHONPATH=tests python -m support.compile_kernels tests/kernels/test_<op>.py

This needs a separate process, because Triton decides on import whether kernels are interpreted or compiled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map

from support.machine_code import listings, loops, tool
from support.processes import run

CAPABILITIES = (80, 90, 100)
LISTED = 90
"""The compute capability for which machine instructions are counted."""


@dataclass(frozen=True)
class Launch:
    """A call of a Triton op, or of its host function, whose kernels must compile.

    Attributes:
        function: The function to call.
        args: The arguments of the function; tensors on the meta device stand for tensors on a GPU.
        tensor_cores: Names of the launched kernels that must use tensor cores.
        capabilities: The compute capabilities to compile for.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    tensor_cores: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = CAPABILITIES


class _Target:
    """Stands in for Triton's driver, with a GPU of the given compute capability that cannot run kernels."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class _Recorder:
    """Replaces torch.library.wrap_triton and records the launches."""

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]
    kernel: Any = None
    grid: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.kernel is None:
            return _Recorder(self.launches, args[0])
        sizes = [*self.grid, 1, 1]
        assert sizes[0] < 2**31, self.grid
        assert max(sizes[1:]) < 2**16, self.grid
        self.launches.append((self.kernel, args, kwargs))
        return None

    def __getitem__(self, grid: Any) -> _Recorder:
        return _Recorder(self.launches, self.kernel, grid)


def _fake(args: Any) -> Any:
    """Replaces meta tensors with fake CUDA tensors."""

    def on_gpu(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    return tree_map(on_gpu, args)


def record(launch: Launch) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Returns the kernels that a call launches, with their arguments."""
    recorder = _Recorder([])
    with FakeTensorMode(), mock.patch.object(torch.library, "wrap_triton", recorder):
        launch.function(*_fake(launch.args))
    return recorder.launches


def count_traced(launch: Launch) -> int:
    """Returns the number of kernels that torch.compile sees in the call, in one graph with dynamic sizes."""
    from torch._functorch.aot_autograd import aot_function

    nodes: list[str] = []

    def look(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        nodes.extend(str(node.target) for node in gm.graph.nodes)
        return gm.forward

    with FakeTensorMode(shape_env=ShapeEnv()):
        aot_function(launch.function, fw_compiler=look, dynamic=True)(*_fake(launch.args))
    return sum("triton_kernel_wrapper" in node for node in nodes)


def _machine_code(cubin: bytes, listed: bool) -> dict[str, Any]:
    """Returns the number of registers and the bytes of stack, which holds spilled registers.

    Args:
        cubin: The kernel.
        listed: Whether to count its machine instructions by name too: all of them, and those of each loop.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), "-res-usage", file.name]
        report = run(command).stdout
        (listing,) = listings(Path(file.name)).values() if listed else ([],)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return {
        "registers": int(found["REG"]),
        "spilled": int(found["STACK"]) + int(found["LOCAL"]),
        "machine": Counter(name for _, name, _ in listing),
        "loops": [loop.instructions for loop in loops(listing)],
    }


def compile_launch(
    kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capabilities: tuple[int, ...]
) -> dict[int, dict[str, Any]]:
    """Compiles one launch for each compute capability and returns its resources and instructions."""
    from triton.runtime.driver import driver

    from panfpn_fast.ops.triton._launch import OPTIONS

    types = [arg.dtype if isinstance(arg, torch.Tensor) else arg for arg in args]
    results = {}
    for capability in capabilities:
        driver.set_active(_Target(capability))
        compiled = kernel.warmup(*types, grid=(1,), **kwargs, **OPTIONS)
        body = re.sub(r"//.*", "", compiled.asm["ptx"])
        instructions = re.findall(
            r"^\s+(?:@!?%p\d+\s+)?([a-z][a-z0-9_]*(?:[.:][\w:]+)*)\s", body, re.MULTILINE
        )
        results[capability] = {
            "shared": compiled.metadata.shared,
            **_machine_code(compiled.asm["cubin"], capability == LISTED),
            "instructions": Counter(instructions),
        }
    return results


def load_launches(path: Path) -> dict[str, Launch]:
    """Returns the launches that a test file lists."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    launches: dict[str, Launch] = module.LAUNCHES
    return launches


def main() -> None:
    """Prints for each launch, as JSON, the number of kernels that torch.compile sees and the compiled kernels."""
    assert os.environ.get("TRITON_INTERPRET", "0") == "0"
    report: dict[str, Any] = {}
    for name, launch in load_launches(Path(sys.argv[1])).items():
        kernels = [
            {"name": kernel.__name__, "targets": compile_launch(kernel, args, kwargs, launch.capabilities)}
            for kernel, args, kwargs in record(launch)
        ]
        report[name] = {"traced": count_traced(launch), "kernels": kernels}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
