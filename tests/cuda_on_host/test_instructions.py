"""Estimates how many instructions ROIAlign and paste_masks_rle take on a GPU.

The estimate adds up the loops of the machine code, times how often each runs. It counts the instructions that the warps
of all blocks issue. It needs no GPU: ptxas gives the length of each loop, and the boxes of the benchmark give the
number of turns.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from cuda_on_host.build import CSRC, missing_for_nvcc
from cuda_on_host.compiled import Compiled, compile_source
from support.machine_code import Loop, tool
from support.repository import load_harness

BOXES, BINS, CHANNELS = 1000, 7, 256
# As in roi_pool.cu: kWarps, kPlanes and kBlockChannels.
NCHW_WARPS, NCHW_GROUP, NCHW_CHANNELS = 8, 4, 64
SETUP_SAMPLE = 2  # a sample has up to two taps, and the loop over them is a part of the loop over samples


@pytest.fixture(scope="module")
def turns() -> Counter[str]:
    """How often the loops of all columns of bins run, for 1000 boxes, 7 x 7 bins and four levels.

    "samples": samples of a bin along the longer axis of each box. Channels-last: "rows n": rows of n pixels that are
    summed; "again": rows whose sum is used again. NCHW, in one group of channels: "items": columns of pixels in rows of
    bins, for each warp; "row pairs": pairs of rows that such an item sums; "column pairs": pairs of columns in a bin.
    """
    inputs = load_harness("inputs")
    found: Counter[str] = Counter()
    for x1, y1, x2, y2 in inputs.boxes(BOXES).double().tolist():
        side = math.sqrt((x2 - x1) * (y2 - y1))
        level = min(max(math.floor(4 + math.log2(side / 224)) - 2, 0), 3)
        scale = inputs.PYRAMID_SCALES[level]
        height, width = (math.ceil(size * scale) for size in inputs.PADDED)
        rows = pixels_of_bins(y1 * scale - 0.5, y2 * scale - 0.5, height)
        columns = pixels_of_bins(x1 * scale - 0.5, x2 * scale - 0.5, width)
        visits = [row for of_bin in rows for row in of_bin]
        summed = 1 + sum(a != b for a, b in pairwise(visits))
        for of_bin in columns:
            found[f"rows {len(of_bin)}"] += summed
            found["again"] += len(visits) - summed
        items = math.ceil(BINS * (1 + max(map(max, columns)) - min(map(min, columns))) / 32)
        found["items"] += items
        found["row pairs"] += items * math.ceil(max(map(len, rows)) / 2)
        found["column pairs"] += math.ceil(BINS**2 / 32) * math.ceil(max(map(len, columns)) / 2)
        found["samples"] += math.ceil(max(x2 - x1, y2 - y1) * scale / BINS)
    return found


def pixels_of_bins(start: float, stop: float, size: int) -> list[list[int]]:
    """Returns the pixels that the samples of each bin touch along one axis."""
    extent = (stop - start) / BINS
    grid = math.ceil(extent)
    found = []
    for i in range(BINS):
        samples = start + i * extent + (np.arange(grid) + 0.5) * extent / grid
        low = np.floor(samples.clip(0, size - 1)).astype(int)
        found.append(sorted({*low.tolist(), *np.minimum(low + 1, size - 1).tolist()}))
    return found


def estimate(kernel: Compiled, chunks: int, turns: Counter[str]) -> int:
    """Returns an upper bound of the warp instructions of pool_channels_last for `chunks` parts of the channels."""
    # The usual way keeps its taps in shared memory; boxes whose taps do not fit take loops without it.
    loops = [loop for loop in kernel.loops if loop.count("LDS") > 0]
    assert not any(loop.count("D(ADD|MUL|FMA)") for loop in loops)  # double precision is slow
    of_row: dict[int, int] = {}
    of_bin: dict[int, int] = {}
    for loop in sorted(loops, key=lambda loop: loop.length):
        pixels, taps = loop.count(r"LDG\.E\.128"), loop.count("LDS")
        if taps <= 2 and 2 <= pixels <= 5:  # the taps of the columns are in registers
            (of_bin if loop.count("STG") else of_row).setdefault(pixels, loop.length)
    any_row, any_bin = (
        min(
            loop.length
            for loop in loops
            if loop.count("LDG") == 3 and loop.count("LDS") in (4, 5) and loop.count("STG") == stores
        )
        for stores in (0, 1)
    )
    assert of_row.keys() == of_bin.keys() == {2, 3, 4, 5}
    of_channels, of_block = (
        min(loop.length for loop in loops if loop.count("STG") == 5 and (loop.count("BAR") > 0) == barriers)
        for barriers in (False, True)
    )

    rows = sum(
        count * of_row.get(pixels, any_row * (pixels + 1) // 2)
        for pixels in range(1, 32)
        if (count := turns[f"rows {pixels}"])
    )
    again = turns["again"] * (3 * of_row[2] - 2 * of_row[3])  # a row without pixels
    bins = BOXES * BINS * BINS * max(of_bin[pixels] - of_row[pixels] for pixels in of_bin)
    columns = BOXES * BINS * (of_channels - sum(of_bin.values()) - any_bin)
    setup = of_block - of_channels
    blocks = BOXES * setup + turns["samples"] * SETUP_SAMPLE * sample_length(loops)
    return chunks * (rows + again + bins + columns + blocks)


def sample_length(loops: list[Loop]) -> int:
    """Returns the length of the loop over the samples of a bin, which divides once, and adds their taps."""
    return max(
        loop.length
        for loop in loops
        if loop.count("MUFU") == 1 and not loop.count("STG|LDG|BAR|SHFL") and loop.count("LDS") <= 2
    )


def estimate_nchw(kernel: Compiled, turns: Counter[str]) -> int:
    """Returns an upper bound of the warp instructions of pool_nchw."""
    loops = [loop for loop in kernel.loops if loop.count("LDS") > 0]
    assert not any(loop.count("D(ADD|MUL|FMA)") for loop in loops)

    def length(loads: int, stores: int) -> int:
        return min(
            loop.length for loop in loops if loop.count("LDG") == loads and loop.count("STG") == stores
        )

    row_pair, item, bins, group = length(8, 0), length(12, 0), length(0, 4), length(12, 4)
    column_pair = min(loop.length for loop in loops if loop.count("LDS") == 10 and not loop.count("STG|LDG"))
    block = max(loop.length for loop in loops if loop.count("BAR"))
    of_bins = math.ceil(BINS**2 / 32)
    of_group = (
        turns["items"] * (item - row_pair)
        + turns["row pairs"] * row_pair
        + BOXES * of_bins * (bins - column_pair)
        + turns["column pairs"] * column_pair
        + BOXES * (group - item - bins)
    )
    # One warp finds the taps and the range of their columns, four bins at a time.
    segments = max(
        loop.length
        for loop in loops
        if loop.count("LDG") == 12 and loop.count("STG") == 4 and not loop.count("BAR")
    )
    scan = max(loop.length for loop in loops if loop.count("LDS") == 12 and not loop.count("STG|LDG"))
    setup = block - segments + (math.ceil(BINS / 4) - 1) * scan + NCHW_WARPS * (segments - group)
    blocks = BOXES * setup + turns["samples"] * SETUP_SAMPLE * sample_length(loops)
    return CHANNELS // NCHW_GROUP * of_group + CHANNELS // NCHW_CHANNELS * blocks


@pytest.mark.parametrize(("name", "chunks", "millions"), [("float, 4", 2, 22), ("BFloat16, 8", 1, 21)])
def test_roi_align(
    kernels: dict[str, Compiled], turns: Counter[str], name: str, chunks: int, millions: int
) -> None:
    """1000 boxes on four levels, 7 x 7 bins, 256 channels."""
    found = estimate(kernels[f"pool_channels_last<{name}>"], chunks, turns) / 1e6
    assert 0.8 * millions < found <= millions


def test_roi_align_nchw(kernels: dict[str, Compiled], turns: Counter[str]) -> None:
    """The same boxes, float32."""
    millions = 91
    found = estimate_nchw(kernels["pool_nchw<float>"], turns) / 1e6
    assert 0.8 * millions < found <= millions


# As in paste_masks_rle.cu: kRasteriseWarps, kStripColumns, kEncodeWarps and kRoundWords.
PASTED, PASTE_WARPS, STRIP_COLUMNS, ENCODE_WARPS, ROUND_WORDS = 100, 8, 64, 16, 4096


def window(low: float, high: float, size: int) -> int:
    """Returns the number of pixels that a mask of 28 x 28 can reach along one axis, as PasteAxis::window."""
    rim = (high - low) * 0.5 / 28
    begin = min(max(math.floor(low - rim) - 2, 0), size)
    return min(max(math.ceil(high + rim) + 2, begin), size) - begin


def test_run_lengths(run_kernels: dict[str, Compiled]) -> None:
    """100 masks on 800 x 1333. An upper bound for pasting, as if each row of pixels read other cells of the mask.

    Loops within a round of the encoder run once, as they do for most words.
    """
    inputs = load_harness("inputs")
    paste = run_kernels["rasterise_columns"]
    row = min(loop.length for loop in paste.loops if loop.count("SHFL") and not loop.count("STG"))
    word = min(loop.length for loop in paste.loops if loop.count("STG") and loop.count("MUFU"))
    strip = max(loop.length for loop in paste.loops)
    encoders = [run_kernels[f"encode_runs<{write}>"] for write in ("false", "true")]
    encode = sum(max(loop.length for loop in kernel.loops) for kernel in encoders)
    found = 0
    for x1, y1, x2, y2 in inputs.boxes(PASTED).double().tolist():
        rows, columns = window(y1, y2, inputs.IMAGE[0]), window(x1, x2, inputs.IMAGE[1])
        words = math.ceil(rows / 32) if rows == inputs.IMAGE[0] else rows // 32 + 1
        strips = math.ceil(columns / STRIP_COLUMNS)
        found += strips * (PASTE_WARPS * (strip - word) + words * (word - row + 32 * row))
        found += math.ceil((columns * words + 1) / ROUND_WORDS) * ENCODE_WARPS * encode
    assert 13.5e6 < found <= 16.5e6


def compile_kernels(stem: str, temporary: pytest.TempPathFactory) -> dict[str, Compiled]:
    if reason := missing_for_nvcc():
        pytest.skip(reason)
    if shutil.which("c++filt") is None or tool("cuobjdump") is None:
        pytest.skip("c++filt (binutils) or cuobjdump is not installed")
    compiled = compile_source(CSRC / "ops" / "cuda" / f"{stem}.cu", 90, temporary.mktemp("instructions"))
    return {kernel.name: kernel for kernel in compiled.kernels}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    return compile_kernels("roi_pool", tmp_path_factory)


@pytest.fixture(scope="module")
def run_kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    return compile_kernels("paste_masks_rle", tmp_path_factory)
