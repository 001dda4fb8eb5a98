"""The host run of CUDA kernels: right kernels give right results in every order, wrong ones are found."""

from __future__ import annotations

import ctypes
import os
import subprocess
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
    missing_for_host,
    missing_for_nvcc,
    sanitizer_runtime,
)

KERNELS = Path(__file__).parent / "kernels"
FIXTURES = sorted(KERNELS.glob("*.cu"))
# Set for the child process that runs the tests of right kernels in a library built with sanitizers.
LIBRARY_VARIABLE = "PANFPN_HOST_KERNELS"

ORDERS = {"forward": (0, 0), "reverse": (1, 0), "random-1": (2, 1), "random-2": (2, 2)}


class Library:
    """A library of fixtures: `call` raises what the harness threw."""

    def __init__(self, path: Path) -> None:
        self._handle = ctypes.CDLL(str(path))
        self._handle.panfpn_host_launch_count.restype = ctypes.c_ulonglong

    def set_order(self, order: str) -> None:
        number, seed = ORDERS[order]
        self._handle.panfpn_host_set_order(number, ctypes.c_ulonglong(seed))

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
    """The fixtures, in each order of threads and blocks."""
    loaded.set_order(request.param)
    return loaded


@pytest.fixture
def forward(loaded: Library) -> Iterator[Library]:
    loaded.set_order("forward")
    yield loaded
    loaded.set_order("forward")


def random_numbers(dtype: str, size: int | tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).integers(-50, 50, size).astype(dtype)


class TestRightKernels:
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
        assert np.array_equal(sums, padded.reshape(blocks, threads).sum(1))  # small integers: sums are exact

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

    @pytest.mark.parametrize(("dtype", "name"), [("int32", "int"), ("float64", "double"), ("uint64", "u64")])
    @pytest.mark.parametrize("n", [1, 33, 1024])
    def test_scan_by_shuffles(self, library: Library, dtype: str, name: str, n: int) -> None:
        values = np.abs(random_numbers(dtype, n)) if dtype != "uint64" else np.arange(n, dtype="uint64") << 33
        scanned = np.zeros_like(values)
        library.call(f"block_scan_{name}", values, scanned, n)
        assert np.array_equal(scanned, np.cumsum(values, dtype=dtype))

    def test_every_warp_function(self, library: Library) -> None:
        values = random_numbers("int32", 32)
        results = np.zeros((14, 32), "uint32")
        library.call("every_warp_function", values, results)
        lane = np.arange(32)
        remainder = np.fmod(values, 3)  # the sign of C's %

        def votes(which: np.ndarray[Any, Any]) -> int:
            return int((which.astype("uint64") << lane.astype("uint64")).sum())

        up = np.where(lane % 16 >= 2, lane - 2, lane)
        down = np.where(lane % 8 + 3 < 8, lane + 3, lane)
        halves = np.where(lane < 16, votes((values > 0) & (lane < 16)), values[lane ^ 1])
        expected = [
            np.full(32, votes(values > 0)),
            np.zeros(32),
            np.ones(32),
            np.full(32, values[5]),
            values[lane // 8 * 8 + 3],
            values[up],
            values[down],
            values[lane ^ 9],
            np.array([votes(remainder == r) for r in remainder]),
            np.full(32, values.sum()),
            np.full(32, values.min()),
            np.full(32, values.max()),
            halves,
            # A negative float has no unsigned value that C++ promises, so this row is checked apart.
            results[13],
        ]
        assert np.array_equal(results, np.array(expected).astype("int64").astype("uint32"))
        mirrored = values[31 - lane]
        assert np.array_equal(results[13][mirrored >= 0], mirrored[mirrored >= 0].astype("uint32"))

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
        bins = np.full(133, 9, "uint32")
        library.call("histogram_int", values, bins, len(values), 133)
        assert np.array_equal(bins, np.bincount(values, minlength=133))

    @pytest.mark.parametrize("n", [1, 31, 32, 150, 200])
    def test_exited_threads_do_not_count_at_a_barrier(self, library: Library, n: int) -> None:
        values = random_numbers("int32", n)
        out = np.zeros(4, "int32")
        library.call("early_exit_int", values, out, n)
        assert out.tolist() == [n, int((values < 0).any()), 1, values.sum()]

    def test_spinning_threads_get_on(self, library: Library) -> None:
        lock, counter = np.zeros(1, "int32"), np.zeros(1, "int32")
        library.call("locked_count_int", lock, counter)
        assert counter[0] == 128
        flag, seen = np.zeros(1, "int32"), np.zeros(1, "int32")
        library.call("wait_for_flag_int", flag, seen)
        assert seen[0] == 7

    def test_all_atomics(self, library: Library) -> None:
        slots = np.array([0, 0, -5, 5, -1, 0, 0, 0, 0], "int32")
        real, wide = np.zeros(1, "float32"), np.zeros(2, "uint64")
        library.call("all_atomics_int", slots, real, wide)
        total = 124 * 123 // 2
        low_31_bits = 2**31 - 1
        # 124 = 4 * 31: each bit is flipped an even number of times.
        assert slots[:8].tolist() == [total, -total, 123, -123, -1 - low_31_bits, low_31_bits, 0, 42]
        assert 1 <= slots[8] <= 124
        assert real[0] == 62
        assert wide.tolist() == [1 << 63, 124 << 32]

    @pytest.mark.parametrize("max_blocks", [1, 3, 100])
    def test_cooperative_grid(self, library: Library, max_blocks: int) -> None:
        values = random_numbers("int32", 1000)
        total, seen, blocks = np.zeros(1, "int32"), np.zeros(100, "int32"), np.zeros(1, "int32")
        library.call("grid_total_int", values, 1000, total, seen, max_blocks, blocks)
        assert 1 <= blocks[0] <= max_blocks
        assert (seen[: blocks[0]] == values.sum()).all()

    def test_indices(self, library: Library) -> None:
        grid, block = (3, 2, 2), (5, 3, 2)
        out = np.zeros((12, 30), "int32")
        library.call("all_indices", out, *grid, *block)
        assert np.array_equal(out, np.arange(12)[:, None] * 1000 + np.arange(30))

    def test_conversions_saturate(self, library: Library) -> None:
        values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, np.nan, np.inf], "float32")
        n = len(values)
        i32, i64, u32 = np.zeros(n, "int32"), np.zeros(n, "int64"), np.zeros(n, "uint32")
        library.call("convert_floats", values, n, i32, i64, u32)
        top, wide_top = 2**31 - 1, 2**63 - 1
        assert i32.tolist() == [0, 2, 2, 0, -2, top, -top - 1, 0, top]
        assert i64.tolist() == [0, 1, 2, -1, -2, wide_top, -wide_top - 1, -wide_top - 1, wide_top]
        assert u32.tolist() == [0, 1, 2, 0, 0, 2**32 - 1, 0, 0, 2**32 - 1]

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
    """What the kernel leaves in its last array argument, for each order."""
    results = {}
    for order in ORDERS:
        library.set_order(order)
        arguments = [a.copy() if isinstance(a, np.ndarray) else a for a in inputs]
        library.call(name, *arguments)
        output = next(a for a in reversed(arguments) if isinstance(a, np.ndarray))
        results[order] = output.tobytes()
    return results


class TestMissingBarriers:
    """Nothing is reported, but the result depends on the order and is wrong in one of them."""

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
        with pytest.raises(RuntimeError, match=f"written outside the bounds of {array}"):
            forward.call(name, np.zeros(32, "float32"))

    def test_limits(self, forward: Library) -> None:
        out = np.zeros(32, "float32")
        forward.call("planted_shared_limit", out, 20_000)
        # Above 32 KiB the launch opts in to all that there is.
        forward.call("planted_shared_limit", out, 100_000)
        for bytes_ in (230_000, 300_000):
            with pytest.raises(RuntimeError, match="shared memory"):
                forward.call("planted_shared_limit", out, bytes_)


class TestReports:
    """Misuse ends in an exception that names kernel, block, thread and line; the next launch works."""

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            (
                "planted_two_barriers",
                r"kernel barriers_at_two_places, block \(0, 0, 0\), thread .*divergent barrier",
            ),
            ("planted_two_kinds", "divergent barrier.*__syncthreads_"),
            ("planted_deadlock", r"kernel waits_crosswise: (deadlock|.*divergent)"),
            ("planted_mask_without_self", r"mask 0xffff does not name the calling lane"),
            ("planted_partial_warp", r"names lanes that the block does not have: 0xffff0000"),
            ("planted_spin", "kernel spins_for_ever.*spin"),
            ("planted_grid_exit", "grid_sync"),
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

    def test_active_mask_is_the_calling_lane(self, library: Library) -> None:
        out = np.zeros(32, "int32")
        library.call("planted_active_mask", out)
        assert (out == 1).all()

    @pytest.mark.parametrize("threads", [0, 1025])
    def test_invalid_launch(self, forward: Library, threads: int) -> None:
        with pytest.raises(RuntimeError, match="kernel nothing: invalid launch"):
            forward.call("launch_nothing", 1, threads)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if LIBRARY_VARIABLE in os.environ:
        pytest.skip("already in the child process")
    reason = missing_for_host()
    if reason:
        pytest.skip(reason)
    if not Path(sanitizer_runtime("asan")).is_absolute():
        pytest.skip("g++ has no AddressSanitizer library")
    flags = ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"]
    return build_library(FIXTURES, tmp_path_factory.mktemp("sanitized"), flags)


class TestSanitizers:
    """The same library under AddressSanitizer and the alignment check, in child processes."""

    @staticmethod
    def run(sanitized: Path, *command: str) -> subprocess.CompletedProcess[str]:
        # Python itself is built without the sanitizer, and its runtime has to come first in the process.
        environment = {
            **os.environ,
            "LD_PRELOAD": f"{sanitizer_runtime('asan')} {sanitizer_runtime('stdc++')}",
            "ASAN_OPTIONS": "detect_leaks=0",
            LIBRARY_VARIABLE: str(sanitized),
        }
        return subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
        )

    def test_right_kernels_are_clean(self, sanitized: Path) -> None:
        selected = "TestRightKernels or TestReports or unwritten"
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


@pytest.mark.parametrize("source", FIXTURES, ids=lambda path: path.stem)
def test_nvcc_compiles(source: Path, tmp_path: Path) -> None:
    reason = missing_for_nvcc()
    if reason:
        pytest.skip(reason)
    assert compile_with_nvcc(source, tmp_path).stat().st_size > 0
