"""Every CUDA op, host function and kernels, compiled for the CPU: the bodies that a GPU would run, run here."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from op_checks import OPS, assert_agrees, averaging_tolerance
from op_samples import DEGENERATE_BOXES, random_rois

import panfpn_fast.ops

NAN = float("nan")
ROOT = Path(__file__).resolve().parents[2]
CUDA_OPS = [name for name, op in OPS.items() if not op.triton]
ORDERS = {"forward": 0, "reverse": 1, "random": 2}


@pytest.fixture(scope="session")
def host_library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """Builds _C_cuda_on_host.so (again only where a source changed) and registers its ops."""
    if not (ROOT / "csrc").is_dir():
        pytest.skip("csrc/ is not beside tests/: the kernels cannot be compiled for the host")
    for program in ("cmake", "ninja", "g++"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: the kernels cannot be compiled for the host")
    build = request.config.cache.mkdir(f"cuda_on_host-torch-{torch.__version__}")
    torch_dir = Path(torch.__file__).parent
    commands = [
        ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DPANFPN_BUILD_CUDA_ON_HOST=ON",
         f"-DPANFPN_TORCH_DIR={torch_dir}"],
        ["cmake", "--build", str(build)],
    ]  # fmt: skip
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    path = build / "_C_cuda_on_host.so"
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.panfpn_host_launch_count.restype = ctypes.c_ulonglong
    library.panfpn_host_set_order.argtypes = [ctypes.c_int, ctypes.c_ulonglong]
    return library


@pytest.fixture(params=ORDERS)
def thread_order(request: pytest.FixtureRequest, host_library: ctypes.CDLL) -> Iterator[str]:
    """Runs the threads of each block in different orders: a missing barrier shows in one of them."""
    host_library.panfpn_host_set_order(ORDERS[request.param], 1)
    yield request.param
    host_library.panfpn_host_set_order(ORDERS["forward"], 0)


def op_samples(name: str) -> list[Any]:
    """The samples with which the op's own tests check the CPU op, in float32 and float16 feature maps."""
    path = ROOT / "tests" / "ops" / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(f"samples_of_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dtypes = (torch.float32, torch.float16) if "roi_align" in name else (torch.float32,)
    return [sample for dtype in dtypes for sample in module.make_samples(dtype, torch.device("cpu"))]


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch, host_library: ctypes.CDLL) -> None:
    """Makes the public functions call the CUDA ops."""
    for name in CUDA_OPS:
        monkeypatch.setattr(torch.ops.panfpn_fast, name, getattr(torch.ops.panfpn_fast_cuda_on_host, name))


@pytest.mark.parametrize("name", [name for name in CUDA_OPS if not OPS[name].host_result])
def test_kernels_agree_with_the_reference(
    name: str, thread_order: str, on_host: None, host_library: ctypes.CDLL
) -> None:
    launches = host_library.panfpn_host_launch_count()
    for i, sample in enumerate(op_samples(name)):
        expected = sample.run(OPS[name].reference)
        actual = sample.run(OPS[name].function)
        assert_agrees(actual, expected, sample.tolerance, f"{name}, sample {i}, {thread_order}")
        strided = sample.map_tensors(lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 1])
        assert_agrees(
            strided.run(OPS[name].function), expected, sample.tolerance, f"{name}, sample {i}, strided"
        )
    assert host_library.panfpn_host_launch_count() > launches, "no kernel ran"


def test_channels_last_kernel(on_host: None, thread_order: str) -> None:
    features = torch.randn(2, 37, 19, 23, generator=torch.Generator().manual_seed(0))
    boxes = [torch.tensor([[1.0, 2.0, 60.0, 50.0], [-9.0, 5.0, 30.0, 300.0]]), torch.zeros(0, 4)]
    for sampling_ratio in (0, 2):
        args = (boxes, (3, 5), 0.25, sampling_ratio, True)
        expected = OPS["roi_align"].reference(features, *args)
        actual = panfpn_fast.ops.roi_align(features.to(memory_format=torch.channels_last), *args)
        assert actual.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("channels", [1, 5, 8, 132])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_wide_loads_of_channels(
    channels: int, dtype: torch.dtype, on_host: None, host_library: ctypes.CDLL
) -> None:
    """Whole packs of 16 bytes, lanes without channels, more channels than lanes, and none of it divisible."""
    features = torch.randn(1, channels, 9, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    # Of few samples, of more than a warp has lanes, and of few samples that lie further apart than a warp.
    boxes = torch.tensor(
        [[0.0, 1.0, 2.0, 8.0, 7.0], [0.0, -90.0, -70.0, 90.0, 80.0], [9.0, 0.0, 0.0, 5.0, 5.0]]
    )
    for sampling_ratio in (0, 2):
        args = (boxes, (2, 3), 1.0, sampling_ratio, True)
        expected = OPS["roi_align"].reference(features, *args)
        actual = panfpn_fast.ops.roi_align(features.to(memory_format=torch.channels_last), *args)
        tolerance = averaging_tolerance(dtype)
        torch.testing.assert_close(actual, expected, rtol=tolerance.relative, atol=tolerance.absolute)


@pytest.mark.parametrize("channels", [1, 6, 67])
@pytest.mark.parametrize(
    ("output_size", "sampling_ratio"),
    [((2, 3), 0), ((28, 17), 2), ((3, 2), 100), ((24, 2), 17), ((1, 400), 1)],
    ids=["few cells", "cells in several turns", "cells in turn", "too many samples", "too many cells"],
)
def test_planes_of_channels(
    channels: int, output_size: tuple[int, int], sampling_ratio: int, on_host: None, thread_order: str
) -> None:
    """NCHW: channels that fill no group of planes, and boxes whose taps shared memory holds or does not hold."""
    features = torch.randn(2, channels, 9, 11, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor(
        [
            [1.0, 1.0, 2.0, 8.0, 7.0],
            [0.0, -90.0, -70.0, 90.0, 80.0],
            [0.0, 9.0, 8.0, 2.0, 1.0],
            [1.0, 10.5, 8.5, 11.0, 9.0],
            [0.0, 1e3, 1e3, 2e3, 2e3],
            [7.0, 0.0, 0.0, 5.0, 5.0],
        ]
    )
    args = (features, rois, output_size, 1.0, sampling_ratio, True)
    expected = OPS["roi_align"].reference(*args)
    tolerance = averaging_tolerance(torch.float32)
    assert_agrees(panfpn_fast.ops.roi_align(*args), expected, tolerance, thread_order)


def backward_calls(name: str) -> list[tuple[Any, ...]]:
    """Arguments of the backward op but the last, on odd and degenerate inputs, for every layout and dtype."""
    calls: list[tuple[Any, ...]] = []
    random = torch.Generator().manual_seed(5)
    degenerate = torch.cat([torch.zeros(len(DEGENERATE_BOXES), 1), DEGENERATE_BOXES], dim=1)
    for channels, pooled, sampling_ratio in (
        (5, (3, 2), 0),
        (8, (7, 7), 2),
        (132, (1, 9), 0),
        (4, (2, 35), 0),
    ):
        rois = torch.cat([random_rois(9, 2, (52, 68), channels), degenerate, torch.full((1, 5), 7.0)])
        for dtype in (torch.float32, torch.float16):
            for channels_last in (False, True):
                grad = torch.randn(len(rois), channels, *pooled, generator=random).to(dtype)
                if channels_last:
                    grad = grad.contiguous(memory_format=torch.channels_last)
                if name == "roi_align":
                    calls.append((grad, rois, 0.25, sampling_ratio, True, 2, 13, 17, channels_last))
                else:
                    levels = ([0.25, 0.125], sampling_ratio, False, 32.0, 3, 1e-8)
                    calls.append((grad, rois, *levels, 2, [13, 7], [17, 9], channels_last))
    return calls


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["roi_align", "multiscale_roi_align"])
def test_backward_kernels_agree_with_the_cpu(
    name: str, deterministic: bool, thread_order: str, host_library: ctypes.CDLL
) -> None:
    host_op = getattr(torch.ops.panfpn_fast_cuda_on_host, f"{name}_backward")
    cpu_op = getattr(torch.ops.panfpn_fast, f"{name}_backward")
    for i, call in enumerate(backward_calls(name)):
        actual, expected = host_op(*call, deterministic), cpu_op(*call, deterministic)
        assert_agrees(
            actual, expected, averaging_tolerance(call[0].dtype), f"{name}, call {i}, {thread_order}"
        )


@pytest.mark.parametrize("name", ["roi_align", "multiscale_roi_align"])
def test_deterministic_backward_does_not_depend_on_the_order_of_threads(
    name: str, host_library: ctypes.CDLL
) -> None:
    host_op = getattr(torch.ops.panfpn_fast_cuda_on_host, f"{name}_backward")
    results = []
    for order in ORDERS.values():
        host_library.panfpn_host_set_order(order, 1)
        results.append([host_op(*call, True) for call in backward_calls(name)[:4]])
    host_library.panfpn_host_set_order(ORDERS["forward"], 0)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_threshold_follows_the_cuda_peer(on_host: None) -> None:
    # IoU 30 / 100 against 0.3: equal in float32, above the double 0.3.
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 3.0]])
    assert panfpn_fast.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.3).tolist() == [0, 1]


@pytest.mark.parametrize("rule", ["detectron2", "mmdetection", "panopticapi"])
def test_merge_with_many_claims(on_host: None, thread_order: str, rule: str) -> None:
    """Instances that overlap again and again: what one claims the next must see, whichever thread looks."""
    random = torch.Generator().manual_seed(3)
    corner = torch.rand(60, 2, generator=random) * 60
    boxes = torch.cat([corner, corner + 10 + 50 * torch.rand(60, 2, generator=random)], dim=1)
    masks = torch.rand(60, 28, 20, generator=random)
    scores, classes = torch.rand(60, generator=random), torch.arange(60)
    semantic = torch.randint(0, 9, (77, 101), generator=random)
    kwargs: dict[str, Any] = {
        "score_threshold": 0.1,
        "overlap_threshold": 0.7,
        "stuff_area_threshold": 20,
        "rule": rule,
    }
    args = (masks, boxes, scores, classes, semantic, (77, 101))
    actual = panfpn_fast.ops.panoptic_merge(*args, **kwargs)
    expected = OPS["panoptic_merge"].reference(*args, **kwargs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_merge_of_instances_that_share_a_barrier(on_host: None, thread_order: str) -> None:
    """Many small boxes, few of which meet, over rows of more than one piece: waves of every length."""
    random = torch.Generator().manual_seed(5)
    corner = torch.rand(90, 2, generator=random) * torch.tensor([290.0, 30.0])
    boxes = torch.cat([corner, corner + 3 + 9 * torch.rand(90, 2, generator=random)], dim=1)
    masks, scores = torch.rand(90, 7, 5, generator=random), torch.rand(90, generator=random)
    semantic = torch.randint(0, 9, (37, 301), generator=random).to(torch.uint8)
    args = (masks, boxes, scores, torch.arange(90), semantic, (37, 301))
    kwargs: dict[str, Any] = {"score_threshold": 0.1, "stuff_area_threshold": 900}
    for max_segments in (0, 20, 120):
        actual = panfpn_fast.ops.panoptic_merge_padded(*args, **kwargs, max_segments=max_segments)
        expected = OPS["panoptic_merge_padded"].reference(*args, **kwargs, max_segments=max_segments)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("threshold", [0.5, 0.0, -1.0])
def test_paste_over_several_tiles(threshold: float, on_host: None, thread_order: str) -> None:
    """Images of three tiles that begin at no multiple of 16, and boxes of more than a warp takes at a time."""
    random = torch.Generator().manual_seed(6)
    masks = torch.rand(5, 9, 6, generator=random)
    boxes = torch.tensor(
        [
            [-5.0, -3.0, 390.0, 150.0],
            [3.5, 80.5, 131.0, 90.0],
            [200.0, 133.0, 20.0, 1.0],
            [0.0, 0.0, 999.0, 4.0],
            [NAN, 0.0, 9.0, 9.0],
        ]
    )
    args = (masks, boxes, (173, 397), threshold)
    assert torch.equal(panfpn_fast.ops.paste_masks(*args), OPS["paste_masks"].reference(*args))


@pytest.mark.parametrize("image_size", [(1, 1), (3, 1), (1, 17), (5, 3), (4, 8), (3, 16)])
def test_paste_into_images_of_few_bytes(
    image_size: tuple[int, int], on_host: None, thread_order: str
) -> None:
    """Several images share 16 bytes, or end in the middle of them."""
    random = torch.Generator().manual_seed(7)
    corner = torch.rand(21, 2, generator=random) * 6 - 3
    boxes = torch.cat([corner, corner + 8 * torch.rand(21, 2, generator=random)], dim=1)
    args = (torch.rand(21, 3, 4, generator=random), boxes, image_size, 0.5)
    assert torch.equal(panfpn_fast.ops.paste_masks(*args), OPS["paste_masks"].reference(*args))


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 128, 129, 1000, 1201])
def test_suppression_at_the_edges_of_tiles(count: int, on_host: None, thread_order: str) -> None:
    """Boxes in long chains of overlaps, so that which are kept depends on many others in and between tiles."""
    random = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=random) * torch.tensor([3.0 * count**0.5, 40.0])
    boxes = torch.cat([corner, corner + 5 + 30 * torch.rand(count, 2, generator=random)], dim=1)
    scores = (torch.rand(count, generator=random) * 500).round() / 500
    idxs = torch.randint(0, 3, (count,), generator=random)
    for groups in (None, idxs):
        for max_output in (count, count // 4 + 1):
            args = (boxes, scores, groups, 0.2, max_output)
            actual = panfpn_fast.ops.nms_padded(*args)
            torch.testing.assert_close(actual, OPS["nms_padded"].reference(*args), rtol=0, atol=0)


def test_suppression_in_sorted_order(on_host: None) -> None:
    """More boxes than are ordered by counting, in a batch of different orders."""
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 8193, 2, generator=random) * 30
    boxes = torch.cat([corner, corner + 5 + 30 * torch.rand(2, 8193, 2, generator=random)], dim=2)
    scores = torch.rand(2, 8193, generator=random)
    args = (boxes, scores, None, 0.3, 40)
    actual = panfpn_fast.ops.nms_padded(*args)
    torch.testing.assert_close(actual, OPS["nms_padded"].reference(*args), rtol=0, atol=0)
