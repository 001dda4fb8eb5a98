"""Compiles the CUDA kernels and reads their registers, spills and instructions from ptxas and the disassembler."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from cuda_on_host.build import CSRC, CompileError
from support.processes import run

SOURCES = sorted((CSRC / "ops" / "cuda").glob("*.cu"))

_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xptxas=-v", "-DUSE_CUDA"]
_FLAGS += ["-DPANFPN_DEVICE=CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-I", str(CSRC)]
_FLAGS += ["-isystem", str(Path(torch.__file__).parent / "include")]


@dataclass(frozen=True)
class Loop:
    """The instructions between the target of a backward branch and the branch, with those of inner loops."""

    instructions: Counter[str]

    @property
    def length(self) -> int:
        return self.instructions.total()

    def count(self, pattern: str) -> int:
        """Returns how many instructions match a pattern from their beginning."""
        return sum(count for name, count in self.instructions.items() if re.match(pattern, name))


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


def tool(name: str) -> str | None:
    """Returns a program of the CUDA toolkit, from PATH or from Triton's wheel; None if it is in neither."""
    spec = importlib.util.find_spec("triton.backends.nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return shutil.which(name) or next(
        (found for folder in folders if (found := shutil.which(name, path=str(Path(folder, "bin"))))), None
    )


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


def _listings(cubin: Path) -> dict[str, list[tuple[int, str, str]]]:
    """Returns address, name and operands of each kernel's instructions; empty without a disassembler."""
    disassembler = tool("cuobjdump")
    if disassembler is None:
        return {}
    found = {}
    for part in run([disassembler, "-sass", cubin]).stdout.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        found[name.strip()] = [
            (int(address, 16), instruction, operands)
            for address, instruction, operands in re.findall(
                r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", body
            )
        ]
    return found


def _loops(listing: list[tuple[int, str, str]]) -> list[Loop]:
    """Returns the loops that branches close, except branches to themselves, which fill the end of the code."""
    bounds = set()
    for address, name, operands in listing:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if name.startswith("BRA") and target is not None and int(target.group(1), 16) < address:
            bounds.add((int(target.group(1), 16), address))
    return [
        Loop(Counter(name for address, name, _ in listing if first <= address <= last))
        for first, last in sorted(bounds)
    ]


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
    bounds, listings = _launch_bounds(ptx), _listings(cubin)
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
                Counter(instruction for _, instruction, _ in listings.get(name, [])),
                _loops(listings.get(name, [])),
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
