"""The choice of GPU architectures at build time, with a pretended nvcc and pretended GPUs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from support.processes import ROOT, Finished, environment, run

FUNCTION = ROOT / "cmake" / "cuda_architectures.cmake"

# What `nvcc --list-gpu-arch` of CUDA 12.8 and 13.0 prints, shortened.
CUDA_12 = (50, 60, 70, 75, 80, 86, 87, 89, 90, 100, 101, 120)
CUDA_13 = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)

ALL_OF_CUDA_13 = "75-real;80-real;86-real;89-real;90-real;100-real;120"


def write_program(path: Path, lines: list[str]) -> None:
    path.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    path.chmod(0o755)


def configure(folder: Path, known: tuple[int, ...], gpus: list[str], arch_list: str | None) -> Finished:
    """Runs the function with a pretended nvcc, the GPUs that nvidia-smi reports, and TORCH_CUDA_ARCH_LIST."""
    if not FUNCTION.is_file():
        pytest.skip("there is no cmake/ next to tests/: the function cannot be run")
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed: the function cannot be run")
    write_program(folder / "nvcc", [f"compute_{number}" for number in known])
    path = [str(folder), *os.environ["PATH"].split(os.pathsep)]
    if gpus:
        write_program(folder / "nvidia-smi", gpus)
    else:
        path = [entry for entry in path if not Path(entry, "nvidia-smi").exists()]
    script = folder / "choose.cmake"
    script.write_text(
        f'set(CMAKE_CUDA_COMPILER "{folder / "nvcc"}")\ninclude("{FUNCTION}")\n'
        'panfpn_choose_cuda_architectures(chosen)\nmessage(NOTICE "chosen: ${chosen}.")\n'
    )
    env = environment(PATH=os.pathsep.join(path), TORCH_CUDA_ARCH_LIST=arch_list)
    return run([cmake, "-P", script], env=env, check=False)


@pytest.mark.parametrize(
    ("known", "gpus", "arch_list", "chosen"),
    [
        (CUDA_13, [], None, ALL_OF_CUDA_13),
        (CUDA_12, [], None, ALL_OF_CUDA_13),
        (CUDA_13, ["9.0", "9.0"], None, "90"),
        (CUDA_13, ["7.5"], None, "75"),  # T4
        (CUDA_13, ["8.9", "7.5"], None, "89;75"),
        (CUDA_12, ["7.0"], None, "70"),  # V100
        (CUDA_13, ["12.1"], None, "121"),
        # A GPU that is too new takes the PTX at the end of the list.
        (CUDA_12, ["10.3"], None, ALL_OF_CUDA_13),
        (CUDA_12, ["8.6", "12.1"], None, ALL_OF_CUDA_13),
        # A GPU that is too old does not keep the ops from the other one.
        (CUDA_13, ["7.0", "8.0"], None, "80"),
        (CUDA_13, ["7.0"], None, ALL_OF_CUDA_13),
        (CUDA_13, ["No devices were found"], None, ALL_OF_CUDA_13),
        (CUDA_13, ["9.0"], "", "90"),
        (CUDA_13, ["9.0"], "7.5", "75-real"),
        (CUDA_13, [], "8.0 8.6,9.0", "80-real;86-real;90-real"),
        (CUDA_13, [], "8.0;9.0+PTX", "80-real;90"),
        (CUDA_13, [], "9.0a;9.0a", "90a-real"),
        (CUDA_13, [], "12.0f", "120f-real"),
        (CUDA_12, [], "7.0;7.5", "70-real;75-real"),
    ],
)
def test_choice(
    known: tuple[int, ...], gpus: list[str], arch_list: str | None, chosen: str, tmp_path: Path
) -> None:
    done = configure(tmp_path, known, gpus, arch_list)
    assert done.returncode == 0, done.stderr
    assert f"chosen: {chosen}." in done.stderr


@pytest.mark.parametrize(
    ("known", "arch_list", "words"),
    [
        (CUDA_13, "Hopper", "expected versions such as 8.0"),
        (CUDA_13, "native", "got 'native'"),
        (CUDA_13, "8.0;90", "got '90'"),
        (CUDA_13, "7.0", "does not compile for '7.0'"),
        (CUDA_12, "10.3+PTX", "does not compile for '10.3+PTX'"),
    ],
)
def test_invalid_list(known: tuple[int, ...], arch_list: str, words: str, tmp_path: Path) -> None:
    done = configure(tmp_path, known, [], arch_list)
    assert done.returncode != 0
    assert words in " ".join(done.stderr.split())


def test_a_gpu_without_ops_is_named(tmp_path: Path) -> None:
    assert "No CUDA ops for the GPU of architecture 70" in configure(tmp_path, CUDA_13, ["7.0"], None).stdout
