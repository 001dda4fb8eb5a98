"""The host run of CUDA kernels: correct kernels give correct results in every order, and faults are detected."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuda_on_host.build import (
    build_library,
    compile_with_nvcc,
    link_with_nvcc,
    missing_for_host,
    missing_for_nvcc,
    sanitizer_runtime,
)
from support.processes import Finished, environment, run

KERNELS = Path(__file__).parent / "kernels"
FIXTURES = sorted(KERNELS.glob("*.cu"))
# Names the library built with sanitizers; set for the child process that repeats some tests with it.
LIBRARY_VARIABLE = "PANFPN_HOST_KERNELS"

ORDERS = {"forward": (0, 0), "reverse": (1, 0), "random-1": (2, 1), "random-2": (2, 2)}


class Library:
    """A library of fixtures. `call` raises an error that the harness threw as a RuntimeError."""

    def __init__(self, path: Path) -> None:
        self._handle = ctypes.CDLL(str(path))
        self._handle.panfpn_host_launch_count.restype = ctypes.c_ulonglong

    def set_order(self, order: str) -> None:
        number, seed = ORDERS[order]
        self._handle.panfpn_host_set_order(number, ctypes.c_ulonglong(seed))

    def set_compute_capability(self, capability: int) -> None:
        assert self._handle.panfpn_host_set_compute_capability(capability) == 1

    def launch_count(self) -> int:
        return int(self._handle.panfpn_host_launch_count())

    def call(self, name: str, *arguments: np.ndarray[Any, Any] | int) -> None:
        function = getattr(self._handle, name)
        function.restype = ctypes.c_char_p
        message = function(
            *(
                ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else ctypes.c_int(a)
                for a in arguments
            )
        )
        if message is not None:
            raise RuntimeError(message.decode())


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Library:
    built = os.environ.get(LIBRARY_VARIABLE)
    if built:
        return Library(Path(built))
    reason = missing_for_host()
    if reason:
        pytest.skip(reason)
    return Library(build_library(FIXTURES, tmp_path_factory.mktemp("host_kernels")))


@pytest.fixture(params=ORDERS)
def library(loaded: Library, request: pytest.FixtureRequest) -> Library:
    """The fixtures, with each order of threads and blocks."""
    loaded.set_order(request.param)
    return loaded


@pytest.fixture
def forward(loaded: Library) -> Iterator[Library]:
    loaded.set_order("forward")
    yield loaded
    loaded.set_order("forward")


def random_numbers(dtype: str, size: int | tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).integers(-50, 50, size).astype(dtype)


class TestCorrectKernels:
    @pytest.mark.parametrize(
        ("dtype", "name", "threads"), [("float32", "float", 128), ("float64", "double", 64)]
    )
    @pytest.mark.parametrize("n", [1, 63, 128, 1000])
    def test_block_sum(self, library: Library, dtype: str, name: str, threads: int, n: int) -> None:
        values = random_numbers(dtype, n)
        blocks = -(-n // threads)
        sums = np.full(blocks, np.nan, dtype)
        library.call(f"block_sum_{name}", values, sums, n)
        padded = np.zeros(blocks * threads, dtype)
        padded[:n] = values
        assert np.array_equal(
            sums, padded.reshape(blocks, threads).sum(1)
        )  # sums of small integers are exact

    @pytest.mark.parametrize("shape", [(1, 1), (16, 16), (33, 50)])
    def test_two_dimensional_blocks(self, library: Library, shape: tuple[int, int]) -> None:
        values = random_numbers("float32", shape)
        output = np.full(shape[::-1], np.nan, "float32")
        library.call("transpose_float", values, output, *shape)
        assert np.array_equal(output, values.T)

    def test_dynamic_shared_memory(self, library: Library) -> None:
        values = random_numbers("int32", (5, 100))
        output = np.zeros_like(values)
        library.call("reverse_runs_int", values, output, 5, 100)
        assert np.array_equal(output, values[:, ::-1])

    @pytest.mark.parametrize(("dtype", "name"), [("int32", "int"), ("float32", "float"), ("uint64", "u64")])
    @pytest.mark.parametrize("n", [1, 33, 1024])
    def test_scan_by_shuffles(self, library: Library, dtype: str, name: str, n: int) -> None:
        values = np.abs(random_numbers(dtype, n)) if dtype != "uint64" else np.arange(n, dtype="uint64") << 33
        scanned = np.zeros_like(values)
        library.call(f"block_scan_{name}", values, scanned, n)
        assert np.array_equal(scanned, np.cumsum(values, dtype=dtype))

    def test_every_warp_function(self, library: Library) -> None:
        values = random_numbers("int32", 32)
        results = np.zeros((9, 32), "uint32")
        library.call("every_warp_function", values, results)
        lane = np.arange(32)

        def votes(predicate: np.ndarray[Any, Any]) -> int:
            return int((predicate.astype("uint64") << lane.astype("uint64")).sum())

        up = np.where(lane % 16 >= 2, lane - 2, lane)
        halves = np.where(lane < 16, votes((values > 0) & (lane < 16)), values[lane ^ 1])
        expected = [
            np.full(32, votes(values > 0)),
            np.full(32, values[5]),
            values[lane // 8 * 8 + 3],
            values[up],
            values[lane ^ 9],
            np.full(32, values.sum()),
            np.full(32, np.bitwise_or.reduce(values)),
            halves,
            # C++ does not define the unsigned value of a negative float, so this row is checked separately.
            results[8],
        ]
        assert np.array_equal(results, np.array(expected).astype("int64").astype("uint32"))
        mirrored = values[31 - lane]
        assert np.array_equal(results[8][mirrored >= 0], mirrored[mirrored >= 0].astype("uint32"))

    def test_reductions(self, library: Library) -> None:
        values = random_numbers("int32", 32).astype("uint32")
        results = np.zeros((4, 32), "uint32")
        library.call("every_warp_reduction", values, results)
        assert (results[:2] == values.sum(dtype="uint32")).all()
        assert (results[2:] == np.bitwise_or.reduce(values)).all()

    @pytest.mark.parametrize("n", [1, 96, 500])
    def test_compaction_by_ballots(self, library: Library, n: int) -> None:
        values = random_numbers("float32", n)
        kept = np.zeros(-(-n // 32) * 32, "float32")
        counts = np.zeros(-(-n // 32), "int32")
        library.call("compact_warps_float", values, kept, counts, n)
        for warp, count in enumerate(counts):
            of_warp = values[warp * 32 : warp * 32 + 32]
            assert count == (of_warp > 0).sum()
            assert np.array_equal(kept[warp * 32 : warp * 32 + count], of_warp[of_warp > 0])

    def test_histogram(self, library: Library) -> None:
        values = np.random.default_rng(7).integers(0, 133, 5000).astype("int32")
        bins = np.zeros(133, "uint32")
        library.call("histogram_int", values, bins, len(values), 133)
        assert np.array_equal(bins, np.bincount(values, minlength=133))

    @pytest.mark.parametrize("n", [1, 31, 32, 150, 200])
    def test_exited_threads_do_not_count_at_a_barrier(self, library: Library, n: int) -> None:
        values = random_numbers("int32", n)
        out = np.zeros(1, "int32")
        library.call("early_exit_int", values, out, n)
        assert out[0] == values.sum()

    def test_spinning_threads_make_progress(self, library: Library) -> None:
        flag, seen = np.zeros(1, "int32"), np.zeros(1, "int32")
        library.call("wait_for_flag_int", flag, seen)
        assert seen[0] == 7

    def test_all_atomics(self, library: Library) -> None:
        total, words = np.zeros(1, "int32"), np.zeros(2, "uint32")
        wide, real, pack = np.zeros(1, "uint64"), np.zeros(1, "float32"), np.zeros(4, "float32")
        library.call("all_atomics_of_kernels", total, words, wide, real, pack)
        assert total[0] == -(124 * 123 // 2)
        assert words.tolist() == [(124 << 30) % 2**32, 2**31 - 1]
        assert wide[0] == 124 << 32
        assert real[0] == 62
        assert pack.tolist() == [124, 0, -124, 31]

    def test_indices(self, library: Library) -> None:
        grid, block = (3, 2, 2), (5, 3, 2)
        out = np.zeros((12, 30), "int32")
        library.call("all_indices", out, *grid, *block)
        assert np.array_equal(out, np.arange(12)[:, None] * 1000 + np.arange(30))

    def test_launches_from_several_host_threads(self, library: Library) -> None:
        values = [np.arange(1024, dtype="int32") * k for k in range(4)]
        scanned = [np.zeros_like(v) for v in values]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda k: library.call("block_scan_int", values[k], scanned[k], 1024), range(4)))
        for given, result in zip(values, scanned, strict=True):
            assert np.array_equal(result, np.cumsum(given, dtype="int32"))

    def test_empty_grid_launches_nothing(self, library: Library) -> None:
        before = library.launch_count()
        library.call("launch_nothing", 0, 32)
        assert library.launch_count() == before
        library.call("launch_nothing", 1, 32)
        assert library.launch_count() == before + 1


def results_by_order(library: Library, name: str, *inputs: np.ndarray[Any, Any] | int) -> dict[str, bytes]:
    """Returns the contents of the kernel's last array argument after a run in each order."""
    results = {}
    for order in ORDERS:
        library.set_order(order)
        arguments = [a.copy() if isinstance(a, np.ndarray) else a for a in inputs]
        library.call(name, *arguments)
        output = next(a for a in reversed(arguments) if isinstance(a, np.ndarray))
        results[order] = output.tobytes()
    return results


class TestMissingBarriers:
    """A missing barrier is not reported, but the result depends on the order and is wrong in one of them."""

    def test_within_a_loop(self, forward: Library) -> None:
        values = random_numbers("float32", 256)
        results = results_by_order(forward, "planted_missing_barrier", values, np.zeros(4, "float32"), 4)
        right = values.reshape(4, 64).sum(1).tobytes()
        assert any(result != right for result in results.values())
        assert len(set(results.values())) > 1

    def test_between_write_and_read(self, forward: Library) -> None:
        values = random_numbers("float32", 64)
        results = results_by_order(forward, "planted_unordered_read", values, np.zeros(64, "float32"))
        right = np.roll(values, -1).tobytes()
        assert results["forward"] != right
        assert results["reverse"] != right

    def test_between_read_and_overwrite(self, forward: Library) -> None:
        values = np.array([1, 10, 100, 1000], "float32")
        results = results_by_order(forward, "planted_overwrite", values, np.zeros(64, "float32"))
        right = np.full(64, 1111, "float32").tobytes()
        assert results["forward"] != right

    def test_within_a_warp(self, forward: Library) -> None:
        values = random_numbers("int32", 32)
        results = results_by_order(forward, "planted_missing_syncwarp", values, np.zeros(32, "int32"))
        right = values[np.arange(32) ^ 1].tobytes()
        assert all(result != right for result in results.values())

    def test_between_blocks(self, forward: Library) -> None:
        results = results_by_order(forward, "planted_block_order", np.zeros(10, "int32"), 10)
        right = np.arange(1, 11, dtype="int32").tobytes()
        assert results["forward"] == right
        assert results["reverse"] != right
        assert results["random-1"] != right


class TestSharedMemory:
    def test_unwritten_memory_is_nan_in_each_block(self, forward: Library) -> None:
        out = np.zeros(32, "float32")
        forward.call("planted_unwritten", out)
        assert (out[:16] == 1).all()
        assert np.isnan(out[16:]).all()

    @pytest.mark.skipif(LIBRARY_VARIABLE in os.environ, reason="AddressSanitizer reports it first")
    @pytest.mark.parametrize(
        ("name", "array"),
        [
            ("planted_shared_overrun", "shared array row"),
            ("planted_dynamic_overrun", "the dynamic shared memory"),
        ],
    )
    def test_write_beyond_an_array(self, forward: Library, name: str, array: str) -> None:
        with pytest.raises(RuntimeError, match=f"a write outside the bounds of {array}"):
            forward.call(name, np.zeros(32, "float32"))

    @pytest.mark.parametrize(
        ("capability", "kib"), [(75, 64), (80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)]
    )
    def test_limits(self, forward: Library, capability: int, kib: int) -> None:
        static = 1024 * 4  # of the kernel
        out = np.zeros(32, "float32")
        forward.set_compute_capability(capability)
        try:
            forward.call("planted_shared_limit", out, 20_000)
            # Above 32 KiB of dynamic shared memory the launch opts in to the maximum.
            forward.call("planted_shared_limit", out, kib * 1024 - static)
            for bytes_ in (kib * 1024 - static + 4, kib * 1024 + 4):
                with pytest.raises(RuntimeError, match="shared memory"):
                    forward.call("planted_shared_limit", out, bytes_)
        finally:
            forward.set_compute_capability(75)


class TestReports:
    """Misuse raises an exception that names kernel, block, thread and line, and the next launch works."""

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            (
                "planted_two_barriers",
                r"kernel barriers_at_two_places, block \(0, 0, 0\), thread .*divergent barrier",
            ),
            ("planted_deadlock", r"kernel waits_crosswise: (deadlock|.*divergent)"),
            ("planted_mask_without_self", r"mask 0xffff does not include the calling lane"),
            ("planted_partial_warp", r"includes lanes that the block does not have: 0xffff0000"),
            ("planted_spin", "kernel spins_for_ever.*spin"),
        ],
    )
    def test_is_reported(self, library: Library, name: str, words: str) -> None:
        with pytest.raises(RuntimeError, match=words) as caught:
            library.call(name, np.zeros(64, "int32"))
        if name != "planted_spin":
            assert "planted.cu:" in str(caught.value)
        values, scanned = np.ones(64, "int32"), np.zeros(64, "int32")
        library.call("block_scan_int", values, scanned, 64)
        assert np.array_equal(scanned, np.arange(1, 65))

    @pytest.mark.parametrize("n", [1, 31])
    def test_exited_lane_in_a_mask(self, library: Library, n: int) -> None:
        with pytest.raises(RuntimeError, match=r"__ballot_sync.*0xffffffff|have exited"):
            library.call("planted_exited_lane", np.ones(32, "float32"), np.zeros(32, "uint32"), n)

    def test_shuffle_from_outside_the_mask_is_poison(self, library: Library) -> None:
        out = np.zeros(32, "int32")
        library.call("planted_shuffle_outside", out)
        assert out[:16].tolist() == [5] * 15 + [-1]

    @pytest.mark.parametrize("threads", [0, 1025])
    def test_invalid_launch(self, forward: Library, threads: int) -> None:
        with pytest.raises(RuntimeError, match="kernel nothing: invalid launch"):
            forward.call("launch_nothing", 1, threads)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if LIBRARY_VARIABLE in os.environ:
        pytest.skip("this is the child process, which already runs with the sanitizers")
    reason = missing_for_host()
    if reason:
        pytest.skip(reason)
    if not Path(sanitizer_runtime("asan")).is_absolute():
        pytest.skip("g++ has no AddressSanitizer library")
    flags = ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"]
    return build_library(FIXTURES, tmp_path_factory.mktemp("sanitized"), flags)


class TestSanitizers:
    """Runs the same library with AddressSanitizer and the alignment check, in child processes."""

    @staticmethod
    def run(sanitized: Path, *command: str) -> Finished:
        # Python is built without the sanitizer, so its runtime must be preloaded before all other libraries.
        env = environment() | {
            "LD_PRELOAD": f"{sanitizer_runtime('asan')} {sanitizer_runtime('stdc++')}",
            "ASAN_OPTIONS": "detect_leaks=0",
            LIBRARY_VARIABLE: str(sanitized),
        }
        return run([sys.executable, *command], env=env, check=False)

    def test_correct_kernels_are_clean(self, sanitized: Path) -> None:
        selected = "TestCorrectKernels or TestReports or unwritten"
        done = self.run(sanitized, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", selected)
        assert done.returncode == 0, done.stdout + done.stderr

    @pytest.mark.parametrize(
        ("name", "arguments", "words"),
        [
            (
                "planted_shared_overrun",
                "zeros(32, 'float32')",
                "shared_too_short, block (0, 0, 0), thread (31, 0, 0)",
            ),
            ("planted_dynamic_overrun", "zeros(32, 'float32')", "dynamic_too_short"),
            ("planted_shared_overread", "zeros(32, 'float32')", "reads_beyond_shared"),
            ("planted_global_overrun", "zeros(320, 'float32'), 320", "off_by_one, block (10, 0, 0)"),
            ("planted_misaligned", "zeros(64, 'float32'), zeros(64, 'float32')", "misaligned"),
        ],
    )
    def test_bad_access_is_reported(self, sanitized: Path, name: str, arguments: str, words: str) -> None:
        script = (
            "import ctypes, sys; from numpy import zeros\n"
            "library = ctypes.CDLL(sys.argv[1])\n"
            f"arguments = [{arguments}]\n"
            "convert = lambda a: ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(a.ctypes.data)\n"
            f"library.{name}(*map(convert, arguments))\n"
        )
        done = self.run(sanitized, "-c", script, str(sanitized))
        assert done.returncode != 0
        assert words in done.stderr
        assert "planted.cu" in done.stderr


def test_errors_of_the_build_have_a_remedy(tmp_path: Path) -> None:
    """The text of the error that a GPU raises for which nothing was compiled."""
    reason = missing_for_nvcc()
    if reason:
        pytest.skip(reason)
    source = tmp_path / "errors.cu"
    source.write_text(
        """#include <cstdio>
        #include "ops/cuda/launch.cuh"
        int main() {
          for (const cudaError_t error : {cudaErrorNoKernelImageForDevice, cudaErrorLaunchFailure}) {
            try {
              panfpn::check_cuda(error, "merge");
            } catch (const std::exception& caught) {
              std::puts(caught.what());
            }
          }
        }"""
    )
    missing, other = run([link_with_nvcc(source, tmp_path)]).stdout.splitlines()
    assert missing.startswith(
        "kernel merge: no kernel image is available for execution on the device. Built for sm_90"
    )
    assert "reinstall panfpn_fast with TORCH_CUDA_ARCH_LIST=" in missing
    assert other == "kernel merge: unspecified launch failure"


@pytest.mark.parametrize("source", FIXTURES, ids=lambda path: path.stem)
def test_nvcc_compiles(source: Path, tmp_path: Path) -> None:
    reason = missing_for_nvcc()
    if reason:
        pytest.skip(reason)
    assert compile_with_nvcc(source, tmp_path).stat().st_size > 0
