"""Checks of what nvcc and ptxas make of the CUDA kernels, which needs no GPU.

Each bound is the largest value that nvcc of CUDA 13.0 gives for the kernel, over all template arguments and all of
ARCHITECTURES, without a margin. It may be lowered; a change that exceeds one has made the kernel slower on a GPU, or
must state why not. Another version of nvcc may need other bounds.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter

import pytest

from cuda_on_host.build import missing_for_nvcc
from cuda_on_host.compiled import Compiled, CompiledSource, compile_all, unfused_sources
from support.machine_code import tool

# The oldest architecture that CUDA 13 compiles for, that of the H100, and that of the RTX 50.
ARCHITECTURES = (75, 90, 120)

# The most instructions in double precision, which takes 2 (H100) to 64 times as long as single precision. These kernels
# have float64 boxes, or find the window of a mask or the samples of a distant box in float64.
FLOAT64 = {
    "pool_channels_last": 91,
    "pool_nchw": 91,
    "add_boxes": 91,
    "gather_tiles": 54,
    "find_ranges": 85,
    "plan": 64,
    "place": 43,
    "paste_tiles": 57,
    "find_windows": 57,
}

# Bytes of local memory: arrays that a kernel indexes at run time, and spilled registers. Kernels that pool have some of
# both for boxes whose taps do not fit in shared memory, after all loops over other boxes.
STACK = {"gather_tiles": 176, "pool_channels_last": 64, "add_boxes": 80}
SPILLED = {"gather_tiles": 40, "add_boxes": 108}
POOLS = ("pool_channels_last", "pool_nchw", "add_boxes")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[CompiledSource]:
    reason = missing_for_nvcc()
    if reason:
        pytest.skip(reason)
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt (binutils) is not installed")
    return compile_all(ARCHITECTURES, tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def kernels(sources: list[CompiledSource]) -> list[Compiled]:
    return [kernel for source in sources for kernel in source.kernels]


@pytest.fixture(scope="module")
def disassembled(kernels: list[Compiled]) -> list[Compiled]:
    if tool("cuobjdump") is None:
        pytest.skip("cuobjdump is neither on PATH nor in Triton's wheel")
    assert all(kernel.instructions for kernel in kernels)
    return kernels


def stem(kernel: Compiled) -> str:
    return kernel.name.partition("<")[0]


def test_every_kernel_is_found(kernels: list[Compiled]) -> None:
    names = {stem(kernel) for kernel in kernels}
    assert names >= {*FLOAT64, "rank_scores", "suppression_mask", "resolve_suppression", "convert_to_nchw"}
    assert names >= {"rasterise", "paint", "fill_stuff", "rasterise_columns", "encode_runs", "add_lengths"}
    for architecture in ARCHITECTURES:
        of_architecture = [kernel.name for kernel in kernels if kernel.architecture == architecture]
        assert len(of_architecture) == len(set(of_architecture)) == len(kernels) / len(ARCHITECTURES)


def test_registers_allow_the_launches(kernels: list[Compiled]) -> None:
    """A multiprocessor has 65,536 registers and gives each warp a multiple of 256."""
    for kernel in kernels:
        warps = -(-kernel.threads // 32) * kernel.blocks
        assert -(-kernel.registers * 32 // 256) * 256 * warps <= 65536, kernel


def test_static_shared_memory_is_within_the_limit(kernels: list[Compiled]) -> None:
    for kernel in kernels:
        reserved = 0 if kernel.architecture < 90 else 1024  # ptxas counts it from sm_90 on
        assert kernel.shared - reserved <= 48 * 1024, kernel


def test_spills_are_few(kernels: list[Compiled]) -> None:
    for kernel in kernels:
        assert kernel.stack <= STACK.get(stem(kernel), 0), kernel
        assert kernel.spills <= SPILLED.get(stem(kernel), 0), kernel


def test_loops_over_usual_boxes_use_no_local_memory(disassembled: list[Compiled]) -> None:
    """They are the loops that read the taps in shared memory."""
    for kernel in disassembled:
        if stem(kernel) in POOLS:
            usual = [loop for loop in kernel.loops if loop.count("LDS")]
            assert usual
            assert not any(loop.count("LDL|STL") for loop in usual), (kernel.name, kernel.architecture)


def test_arithmetic_is_not_fused_where_cpu_and_gpu_must_agree(sources: list[CompiledSource]) -> None:
    fused = re.compile(r"\bfma\.rn\.f(32|64)")
    for source in sources:
        if source.stem in unfused_sources():
            assert not fused.search(source.ptx), source.stem
    assert any(fused.search(source.ptx) for source in sources)  # the others fuse, so the pattern is right


def test_no_loops_of_compare_and_swap(disassembled: list[Compiled]) -> None:
    for kernel in disassembled:
        assert kernel.count(r".*(CAS|SPIN)") == 0, kernel.name


def test_double_precision_is_rare(disassembled: list[Compiled]) -> None:
    most: Counter[str] = Counter()
    for kernel in disassembled:
        if "double" not in kernel.name:
            found = kernel.count(r"D(ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w+64H")
            assert found <= FLOAT64.get(stem(kernel), 0), (kernel.name, kernel.architecture, found)
            most[stem(kernel)] = max(most[stem(kernel)], found)
    # The pattern finds the instructions: every kernel with a bound has some, and fused ones occur.
    assert {name for name, count in most.items() if count} == set(FLOAT64)
    assert any(kernel.count("DFMA") for kernel in disassembled)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wide_accesses(architecture: int, disassembled: list[Compiled]) -> None:
    found = {kernel.name: kernel for kernel in disassembled if kernel.architecture == architecture}
    for name in ("<float, 4>", "<Half, 8>", "<BFloat16, 8>"):
        pool = found[f"pool_channels_last{name}"]
        assert pool.count(r"LDG\.E\.128") > 0, pool.name
        assert pool.count(r"STG\.E\.128") > 0, pool.name
    assert found["paste_tiles"].count(r"STG\.E\.128") > 0
    for name in ("float", "Half", "BFloat16"):
        add = found[f"add_boxes<{name}, 4>"]
        if architecture >= 90:  # one atomic for four channels
            assert add.count(r"REDG?\.E\.ADD\.F32x4") > 0, add.name
        assert add.count(r"REDG?\.E\.ADD\.F32") > 0, add.name
        assert add.count(r"ATOMG?\.") == 0, add.name  # would wait for the old value
