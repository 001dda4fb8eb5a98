"""Compiles the CUDA kernels and reads their registers, spills and instructions from ptxas and the disassembler."""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from cuda_on_host.build import CSRC, CompileError
from support.machine_code import Loop, listings, loops
from support.processes import run

SOURCES = sorted((CSRC / "ops" / "cuda").glob("*.cu"))

_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xptxas=-v", "-DUSE_CUDA"]
_FLAGS += ["-DPANFPN_DEVICE=CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-I", str(CSRC)]
_FLAGS += ["-isystem", str(Path(torch.__file__).parent / "include")]


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture.

    Attributes:
        name: Its name with template arguments, such as "pool_channels_last<float, 4>".
        architecture: Such as 90.
        registers: Registers of a thread.
        stack: Bytes of local memory of a thread: arrays indexed at run time, and spilled registers.
        spills: Bytes of spilled registers that a thread stores.
        shared: Bytes of static shared memory, without those that the hardware reserves.
        threads: Largest number of threads in a block.
        blocks: Least number of blocks on a multiprocessor that the source demands.
        instructions: The machine instructions with their modifiers, such as "LDG.E.128"; empty without a disassembler.
        loops: The loops of the machine code, by address.
    """

    name: str
    architecture: int
    registers: int
    stack: int
    spills: int
    shared: int
    threads: int
    blocks: int
    instructions: Counter[str]
    loops: list[Loop]

    def count(self, pattern: str) -> int:
        """Returns how many instructions match a pattern from their beginning."""
        return sum(count for name, count in self.instructions.items() if re.match(pattern, name))


@dataclass(frozen=True)
class CompiledSource:
    """A source file for one architecture; `ptx` is its intermediate code."""

    stem: str
    ptx: str
    kernels: list[Compiled]


def unfused_sources() -> set[str]:
    """Returns the stems of the files that CMakeLists.txt compiles without fused multiply-adds."""
    text = (CSRC.parent / "CMakeLists.txt").read_text()
    found = re.search(r"set\(PANFPN_CUDA_UNFUSED_SOURCES ([^)]+)\)", text)
    assert found is not None
    return {Path(name).stem for name in found.group(1).split()}


def _readable(names: list[str]) -> dict[str, str]:
    """Maps mangled names of kernels to their names without namespaces and parameters."""
    demangled = run(["c++filt", *names]).stdout.splitlines()
    short = []
    for name in demangled:
        found = re.search(r"(\w+(?:<[^()]*>)?)\((?!anonymous)", name)
        assert found is not None, name
        short.append(found.group(1).replace("c10::", ""))
    return dict(zip(names, short, strict=True))


def _launch_bounds(ptx: str) -> dict[str, tuple[int, int]]:
    """Returns the most threads of a block, and the least blocks of a multiprocessor, by mangled name."""
    bounds = {}
    for name, head in re.findall(r"\.entry (\w+)\(.*?\)(.*?)\{", ptx, re.DOTALL):
        threads = re.search(r"\.maxntid (\d+)", head)
        blocks = re.search(r"\.minnctapersm (\d+)", head)
        bounds[name] = (int(threads.group(1)) if threads else 1024, int(blocks.group(1)) if blocks else 1)
    return bounds


def compile_source(source: Path, architecture: int, folder: Path) -> CompiledSource:
    """Compiles one CUDA source for an architecture.

    Raises:
        CompileError: If nvcc rejects the file.
    """
    intermediate = folder / f"{source.stem}.{architecture}"
    intermediate.mkdir()
    cubin = intermediate / "kernels.cubin"
    unfused = ["--fmad=false"] if source.stem in unfused_sources() else []
    keep = ["-keep", "-keep-dir", intermediate]
    command = ["nvcc", *_FLAGS, *unfused, f"-arch=sm_{architecture}", "-cubin", *keep, source, "-o", cubin]
    done = run(command, check=False)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    ptx = (intermediate / f"{source.stem}.ptx").read_text()
    bounds, listed = _launch_bounds(ptx), listings(cubin)
    reports = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?"
        r"Used (\d+) registers(.*?)\n",
        done.stderr,
        re.DOTALL,
    )
    names = _readable([report[0] for report in reports])
    kernels = []
    for name, stack, spills, registers, rest in reports:
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Compiled(
                names[name],
                architecture,
                int(registers),
                int(stack),
                int(spills),
                int(shared.group(1)) if shared else 0,
                *bounds[name],
                Counter(instruction for _, instruction, _ in listed.get(name, [])),
                loops(listed.get(name, [])),
            )
        )
    return CompiledSource(source.stem, ptx, kernels)


def compile_all(architectures: tuple[int, ...], folder: Path) -> list[CompiledSource]:
    """Compiles every CUDA source for each architecture, two at a time.

    Raises:
        CompileError: If nvcc rejects a file.
    """
    tasks = [(source, architecture) for architecture in architectures for source in SOURCES]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda task: compile_source(task[0], task[1], folder), tasks))
