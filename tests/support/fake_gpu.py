"""A GPU for Triton on which nothing is compiled and nothing runs: host code runs on CPU tensors, without a GPU.

Triton decides at its import whether it interprets kernels; this needs a process in which it does not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class Launched(NamedTuple):
    """A launch, with the arguments of Triton's launcher.

    Attributes:
        kernel: The kernel's name.
        grid: Number of programs along each axis.
        stream: The stream's handle.
        function: The kernel's handle.
        metadata: The launcher's description of the kernel.
        args: The kernel's arguments, with compile-time arguments.
    """

    kernel: str
    grid: tuple[int, int, int]
    stream: int
    function: Any
    metadata: Any
    args: tuple[Any, ...]


class FakeGpu:
    """Stands in for Triton's driver.

    Attributes:
        device: Index of the current device.
        launches: The launches; None to record none.
        compiled: How many kernels have been compiled.
    """

    def __init__(self) -> None:
        self.device = 0
        self.launches: list[Launched] | None = []
        self.compiled = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 1000 + max(device, 0)  # CPU tensors are on device -1


class _Kernel(CompiledKernel):
    """A kernel whose launches are recorded."""

    def __init__(self, gpu: FakeGpu, source: Any, name: str, number: int) -> None:
        self.src, self.name = source, name
        self.module, self.function, self.packed_metadata = self, number, (name, number)

        def run(x: int, y: int, z: int, stream: int, function: Any, metadata: Any, *rest: Any) -> None:
            if gpu.launches is not None:
                _launch_metadata, _enter, _exit, *args = rest
                gpu.launches.append(Launched(name, (x, y, z), stream, function, metadata, tuple(args)))

        self._run = run

    def __del__(self) -> None:
        """Nothing has been loaded."""


def install() -> FakeGpu:
    """Makes a new fake GPU Triton's current device."""
    gpu = FakeGpu()
    driver.set_active(gpu)

    def compile_nothing(
        self: Any,
        key: Any,
        signature: Any,
        device: Any,
        constants: Any,
        options: Any,
        attributes: Any,
        *_: Any,
    ) -> CompiledKernel:
        gpu.compiled += 1
        source = self.ASTSource(self, signature, constants, attributes)
        self.device_caches[device][0][key] = kernel = _Kernel(gpu, source, self.__name__, gpu.compiled)
        return kernel

    JITFunction._do_compile = compile_nothing
    return gpu
