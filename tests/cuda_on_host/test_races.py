"""ThreadSanitizer finds the races between CUDA threads: none in our kernels, each one that was planted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cuda_on_host.build import (
    OPS_VARIABLE,
    build_library,
    build_ops,
    cached_folder,
    missing_for_host,
    missing_for_ops,
    sanitizer_runtime,
)
from support.processes import Finished, environment, run

HERE = Path(__file__).parent
FIXTURES = sorted((HERE / "kernels").glob("*.cu"))
SECONDS = 900  # for one process; two idle cores need 90
FOUND = 66  # the exit code of a process in which a race was found


def check_races(*command: str, **variables: str) -> Finished:
    """Runs Python with ThreadSanitizer, which must be loaded before all other libraries."""
    env = environment(
        LD_PRELOAD=sanitizer_runtime("tsan"),
        TSAN_OPTIONS=f"exitcode={FOUND} halt_on_error=0 report_thread_leaks=0",
        OMP_NUM_THREADS="1",  # the sanitizer does not see OpenMP's barriers
        **variables,
    )
    return run([sys.executable, *command], env=env, check=False, seconds=SECONDS)


def skip_without_sanitizer() -> None:
    if not Path(sanitizer_runtime("tsan")).is_absolute():
        pytest.skip("g++ has no ThreadSanitizer library")


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := missing_for_host():
        pytest.skip(reason)
    skip_without_sanitizer()
    folder = tmp_path_factory.mktemp("races")
    return build_library(FIXTURES, folder, ["-DPANFPN_RACE_CHECK"], ["-fsanitize=thread"])


# Each kernel with its arguments: arrays of zeros, by their dtype and size, and integers.
PLANTED = {
    "planted_missing_barrier": ("f256 f4 4", "sum_without_barrier"),
    "planted_unordered_read": ("f64 f64", "shift_without_barrier"),
    "planted_overwrite": ("f4 f64", "overwrite_without_barrier"),
    "planted_missing_syncwarp": ("i32 i32", "warp_without_sync"),
    "planted_shuffle_as_barrier": ("i32 i32", "shuffle_as_barrier"),
    "planted_block_order": ("i10 10", "reads_other_block"),
    "planted_plain_beside_atomic": ("i1", "plain_beside_atomic"),
}
CORRECT = {
    "block_sum_float": "f1000 f8 1000",
    "transpose_float": "f1650 f1650 33 50",
    "block_scan_int": "i1024 i1024 1024",
    "compact_warps_float": "f500 f512 i16 500",
    "histogram_int": "i5000 i133 5000 133",
    "early_exit_int": "i150 i1 150",
    "wait_for_flag_int": "i1 i1",
}

CALL = """
import ctypes, sys
import numpy as np

library = ctypes.CDLL(sys.argv[1])
for name, *arguments in (line.split() for line in sys.argv[2].splitlines()):
    dtypes = {"f": "float32", "i": "int32"}
    arrays = [np.zeros(int(a[1:]), dtypes[a[0]]) if a[0] in dtypes else int(a) for a in arguments]
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    message = function(*(a if isinstance(a, int) else ctypes.c_void_p(a.ctypes.data) for a in arrays))
    assert message is None, message
"""


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_race_is_found(fixtures: Path, name: str) -> None:
    arguments, kernel = PLANTED[name]
    done = check_races("-c", CALL, str(fixtures), f"{name} {arguments}")
    assert done.returncode == FOUND, done.stdout + done.stderr
    assert f"{kernel}(" in done.stderr
    assert f"'kernel {kernel}, block (" in done.stderr
    assert "planted.cu:" in done.stderr


def test_correct_kernels_have_no_race(fixtures: Path) -> None:
    calls = "\n".join(f"{name} {arguments}" for name, arguments in CORRECT.items())
    done = check_races("-c", CALL, str(fixtures), calls)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(2 * SECONDS)
def test_the_ops_have_no_race(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Runs each kernel, in one order of threads: the check does not depend on which thread came first."""
    if reason := missing_for_ops():
        pytest.skip(reason)
    skip_without_sanitizer()
    folder = cached_folder("races", request.config, tmp_path_factory)
    library = build_ops(folder, "-DPANFPN_RACE_CHECK=ON")
    report = tmp_path / "report.xml"
    selected = "forward and not padded and (agree_with_the_reference or multiscale or channels_last or wave or noise)"
    command = [
        "-m",
        "pytest",
        "-q",
        "-x",
        "-s",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        "-k",
        selected,
    ]
    files = [str(HERE / name) for name in ("test_ops.py", "test_run_lengths.py")]
    done = check_races(*command, *files, **{OPS_VARIABLE: str(library)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'skipped="0"' in report.read_text(), done.stdout
