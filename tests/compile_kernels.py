"""Compiles the kernels that a test file lists in LAUNCHES for GPUs that need not be there; prints what came out.

    python compile_kernels.py tests/kernels/test_<op>.py

A process of its own, because Triton decides when it is imported whether kernels are interpreted or compiled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
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

CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True)
class Launch:
    """A call of a Triton op, or of its host function, whose kernels must compile.

    Attributes:
        function: What is called.
        args: Its arguments; tensors on the meta device stand for tensors on a GPU.
        tensor_cores: Names of those of its kernels that must use the tensor cores.
        capabilities: The compute capabilities it is for.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    tensor_cores: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = CAPABILITIES


class _Target:
    """Stands in for Triton's driver: a GPU of the given compute capability, on which nothing runs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps its compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class _Recorder:
    """Takes the place of torch.library.wrap_triton and notes the launches."""

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
    """Fake CUDA tensors in place of the meta tensors."""

    def on_gpu(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    return tree_map(on_gpu, args)


def record(launch: Launch) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The kernels that a call launches, with their arguments."""
    recorder = _Recorder([])
    with FakeTensorMode(), mock.patch.object(torch.library, "wrap_triton", recorder):
        launch.function(*_fake(launch.args))
    return recorder.launches


def count_traced(launch: Launch) -> int:
    """How many kernels torch.compile sees in the call, as one graph with dynamic sizes."""
    from torch._functorch.aot_autograd import aot_function

    nodes: list[str] = []

    def look(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        nodes.extend(str(node.target) for node in gm.graph.nodes)
        return gm.forward

    with FakeTensorMode(shape_env=ShapeEnv()):
        aot_function(launch.function, fw_compiler=look, dynamic=True)(*_fake(launch.args))
    return sum("triton_kernel_wrapper" in node for node in nodes)


def _tool(name: str) -> str:
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__path__[0]) / "bin" / name)


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack, which holds spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return {
        "registers": int(found["REG"]),
        "spilled": int(found["STACK"]) + int(found["LOCAL"]),
    }


def compile_launch(
    kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capabilities: tuple[int, ...]
) -> dict[int, dict[str, Any]]:
    """What one launch compiles to, for each compute capability."""
    from triton.runtime.driver import driver

    types = [arg.dtype if isinstance(arg, torch.Tensor) else arg for arg in args]
    results = {}
    for capability in capabilities:
        driver.set_active(_Target(capability))
        compiled = kernel.warmup(*types, grid=(1,), **kwargs)
        body = re.sub(r"//.*", "", compiled.asm["ptx"])
        instructions = re.findall(
            r"^\s+(?:@!?%p\d+\s+)?([a-z][a-z0-9_]*(?:[.:][\w:]+)*)\s", body, re.MULTILINE
        )
        results[capability] = {
            "shared": compiled.metadata.shared,
            **_resources(compiled.asm["cubin"]),
            "instructions": Counter(instructions),
        }
    return results


def load_launches(path: Path) -> dict[str, Launch]:
    """The launches that a test file lists."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    launches: dict[str, Launch] = module.LAUNCHES
    return launches


def main() -> None:
    """Prints, as JSON, for each launch: how many kernels torch.compile sees, and what its kernels compile to."""
    assert os.environ.get("TRITON_INTERPRET", "0") == "0"
    sys.path.insert(0, str(Path(__file__).parent))
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
