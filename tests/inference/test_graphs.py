"""Prediction with CUDA graphs, on a stand-in for a GPU that computes on the CPU."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from panfpn_fast.data.images import ImageArray
from panfpn_fast.inference import PanopticResult, Predictor, resize_shortest_edge
from panfpn_fast.inference import graphs as module
from panfpn_fast.inference.graphs import CudaGraphs, GraphPredictor, make_graph_predictor, pack, unpack
from panfpn_fast.models import PanopticFPN
from panfpn_fast.models.padded import unpad
from support.host_gpu import HostGpu
from support.same_outputs import assert_same
from support.training_samples import SMALL, make_sample, small_model

EDGES = (64, 96)
FEW: dict[str, Any] = {
    "rpn_pre_nms_topk": 60,
    "rpn_post_nms_topk": 50,
    "detections_per_image": 20,
    "instance_score_threshold": 0.2,
}
# With the edges above, the padded shapes are 64 x 96, 64 x 64 and 96 x 64.
SIZES = [(48, 70), (64, 96), (40, 60), (50, 50), (90, 60), (33, 64), (150, 210), (640, 97)]


def photograph(size: tuple[int, int]) -> ImageArray:
    return make_sample(*size, seed=sum(size)).image.permute(1, 2, 0).contiguous().numpy()


def make_pair(gpu: HostGpu, wanted: Any = "all", **settings: Any) -> tuple[Predictor, Predictor]:
    """Returns a predictor with graphs and one without them, with equal weights."""
    limits = {name: settings.pop(name) for name in ("max_graphs", "max_candidates") if name in settings}
    pair = [
        Predictor(
            small_model(**{**FEW, **settings}),
            "cpu",
            short_edge=EDGES[0],
            max_edge=EDGES[1],
            instances=wanted,
        )
        for _ in range(2)
    ]
    model = pair[0].model
    assert isinstance(model, PanopticFPN)
    pair[0]._graphs = GraphPredictor(model, *EDGES, gpu, wanted, **limits)
    return pair[0], pair[1]


def assert_same_results(found: PanopticResult, expected: PanopticResult) -> None:
    assert torch.equal(found.panoptic, expected.panoptic)
    assert found.panoptic.dtype == torch.int32
    assert torch.equal(found.semantic, expected.semantic)
    assert [(s.id, s.class_index, s.area, s.isthing) for s in found.segments] == [
        (s.id, s.class_index, s.area, s.isthing) for s in expected.segments
    ]
    assert torch.equal(found.instances.classes, expected.instances.classes)
    for name in ("boxes", "scores", "mask_probs"):
        # Products of matrices with other numbers of rows may round differently, see `assert_same`.
        one, other = getattr(found.instances, name), getattr(expected.instances, name)
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resize": "mmdetection", "fusion_rule": "mmdetection"},
        {"tasks": ("instance",)},
        {"tasks": ("semantic",)},
        {"size_divisibility": 64, "num_stuff": 300},
    ],
    ids=["detectron2", "mmdetection", "things", "stuff", "many-classes"],
)
def test_equals_the_exact_path(settings: dict[str, Any]) -> None:
    gpu = HostGpu()
    with_graphs, exact = make_pair(gpu, **settings)
    for size in SIZES:
        image = photograph(size)
        assert_same_results(with_graphs(image), exact(image))
    assert gpu.log.count("wait") == gpu.log.count("replay") == len(SIZES)


def test_half_precision() -> None:
    model = small_model(**FEW).bfloat16()
    predictor = Predictor(model, "cpu", short_edge=EDGES[0], max_edge=EDGES[1])
    assert isinstance(predictor.model, PanopticFPN)
    image = photograph((48, 70))
    output = GraphPredictor(predictor.model, *EDGES, HostGpu())(image)
    assert output is not None
    assert output.panoptic.shape == output.semantic.shape == (48, 70)
    assert output.boxes.dtype == output.mask_probs.dtype == torch.float32


def test_one_graph_for_each_padded_shape() -> None:
    gpu = HostGpu()
    predictor, _ = make_pair(gpu)
    for size in ((48, 70), (40, 60), (64, 96), (50, 50), (48, 70)):
        predictor(photograph(size))
    each = ["replay", "wait"]
    assert gpu.log == ["capture", *each, *each, *each, "capture", *each, *each]


def test_the_least_recently_used_graph_is_dropped() -> None:
    gpu = HostGpu()
    predictor, exact = make_pair(gpu, max_graphs=2)
    wide, square, tall = (photograph(size) for size in ((48, 70), (50, 50), (90, 60)))
    captures = []
    for image in (wide, square, wide, tall, wide, square):
        assert_same_results(predictor(image), exact(image))
        captures.append(gpu.log.count("capture"))
    assert captures == [1, 2, 2, 3, 3, 4]
    assert predictor._graphs is not None
    assert list(predictor._graphs._graphs) == [(64, 96), (64, 64)]


def test_warm_up_captures() -> None:
    gpu = HostGpu()
    predictor, _ = make_pair(gpu)
    predictor.warm_up([(48, 70), (50, 50), (96, 140)])
    assert gpu.log.count("capture") == 2
    predictor(photograph((48, 70)))
    assert gpu.log.count("capture") == 2


def test_the_exact_path_predicts_after_an_overflow() -> None:
    gpu = HostGpu()
    predictor, exact = make_pair(gpu, max_candidates=20, score_threshold=0.0)
    seen: list[int] = []
    predictor.model.register_forward_hook(lambda *_: seen.append(1))
    image = photograph((48, 70))
    assert_same_results(predictor(image), exact(image))
    assert gpu.log == ["capture", "replay", "wait"]
    assert seen == [1]


def test_several_images_take_the_exact_path() -> None:
    gpu = HostGpu()
    predictor, exact = make_pair(gpu)
    images = [photograph((48, 70)), photograph((50, 50))]
    for found, expected in zip(predictor(images), exact(images), strict=True):
        assert_same_results(found, expected)
    assert gpu.log == []
    assert len(list(predictor.stream(images))) == 2
    assert gpu.log.count("replay") == 2


def test_wanted_instances() -> None:
    image = photograph((48, 70))
    scores = make_pair(HostGpu())[1](image).instances.scores
    threshold = float(scores[7:9].mean())
    predictor, exact = make_pair(HostGpu(), "panoptic", instance_score_threshold=threshold)
    found = predictor(image)
    assert_same_results(found, exact(image))
    assert len(found.instances) == 8


def test_results_are_not_overwritten() -> None:
    predictor, exact = make_pair(HostGpu())
    images = [photograph((48, 70)), photograph((64, 96)), photograph((40, 60))]
    results = [predictor(image) for image in images]
    for found, image in zip(results, images, strict=True):
        assert_same_results(found, exact(image))


def test_resizes_on_the_host_without_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "resize_plan", lambda *_: None)
    predictor, exact = make_pair(HostGpu())
    for size in ((48, 70), (64, 96)):
        assert_same_results(predictor(photograph(size)), exact(photograph(size)))


def test_arrays_of_any_strides() -> None:
    predictor, exact = make_pair(HostGpu())
    image = photograph((48, 70))
    reversed_image = np.ascontiguousarray(image[::-1])[::-1]
    reversed_image.flags.writeable = False
    assert_same_results(predictor(reversed_image), exact(image))


def test_threads_take_turns() -> None:
    predictor, exact = make_pair(HostGpu())
    images = [photograph(size) for size in SIZES[:4]]
    found: dict[int, PanopticResult] = {}

    def predict(index: int) -> None:
        found[index] = predictor(images[index])

    threads = [threading.Thread(target=predict, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, image in enumerate(images):
        assert_same_results(found[i], exact(image))


class Launches(TorchDispatchMode):
    """Counts what a GPU has to do in each stage, and forbids what makes the host wait for it before the last one."""

    def __init__(self, gpu: HostGpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.counts: Counter[str] = Counter()
        gpu.stage = "submitting"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        reads = ("_local_scalar_dense", "nonzero", "item", "masked_select", "equal", "unique")
        boolean = name.startswith("index") and any(
            isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)
            for value in tree_leaves(args[1:])
        )
        allowed = self.gpu.stage == "waited" or not (boolean or name in reads)
        assert allowed, f"{name} before the host has waited"
        self.counts[self.gpu.stage] += not func.is_view
        return func(*args, **(kwargs or {}))


def test_launches_and_one_wait() -> None:
    """docs/gpu.md has these numbers. Merging is one operation here, with five launches on CUDA."""
    gpu = HostGpu()
    predictor, exact = make_pair(gpu)
    assert predictor._graphs is not None
    predictor(photograph((48, 70)))
    gpu.log.clear()
    image = photograph((40, 60))
    with Launches(gpu) as mode:
        output = predictor._graphs(image)
    assert gpu.log == ["replay", "wait"]
    assert output is not None
    assert mode.counts["submitting"] <= 18
    assert mode.counts["replayed"] <= 30
    given = torch.from_numpy(photograph((64, 96))).permute(2, 0, 1)
    with pytest.raises(AssertionError, match="before the host has waited"), Launches(gpu), torch.no_grad():
        exact.model([given])


def test_packing() -> None:
    given = {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([[True, False, True]]),
        "strided": torch.arange(30.0).reshape(5, 6).t()[::2],
        "empty": torch.zeros(0, 4),
        "shorts": torch.arange(-3, 4, dtype=torch.int16),
        "long": torch.tensor(1 << 40),
        "double": torch.rand(3, 1, dtype=torch.float64),
        "half": torch.rand(2, 3).bfloat16(),
    }
    packed, fields = pack(given)
    assert packed.dtype == torch.uint8
    assert len(packed) == sum(value.numel() * value.element_size() for value in given.values())
    found = unpack(packed.clone(), fields)
    assert found.keys() == given.keys()
    for name, value in given.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    packed.zero_()
    assert not unpack(packed, fields)["bytes"].any()


def test_arguments() -> None:
    model = small_model(**FEW)
    assert Predictor(model, "cpu")._graphs is None
    assert Predictor(model, "cpu", graphs=False)._graphs is None
    with pytest.raises(TypeError, match="graphs: expected True, False or None, got str"):
        Predictor(model, "cpu", graphs="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='graphs: True needs device="cuda", got cpu; use None or False'):
        Predictor(model, "cpu", graphs=True)


@pytest.fixture
def cuda_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the parts of torch.cuda that graphs need, and returns the list of what is called."""
    calls: list[str] = []

    @contextlib.contextmanager
    def context(name: str) -> Iterator[None]:
        calls.append(f"{name} begins")
        yield
        calls.append(f"{name} ends")

    class Stream:
        def __init__(self, name: str = "") -> None:
            self.name = name or f"stream {sum(call == 'new stream' for call in calls)}"
            calls.append("new stream")

        def wait_stream(self, other: Stream) -> None:
            calls.append(f"{self.name} waits for {other.name}")

    current = Stream("current")
    event = SimpleNamespace(
        record=lambda: calls.append("record"), synchronize=lambda: calls.append("synchronize")
    )
    graph = SimpleNamespace(replay=lambda: calls.append("replay"))
    for name, value in {
        "graph_pool_handle": lambda: "pool",
        "Stream": Stream,
        "Event": lambda: event,
        "CUDAGraph": lambda: graph,
        "device": lambda device: context(str(device)),
        "current_stream": lambda: current,
        "stream": lambda stream: context(stream.name),
        "graph": lambda graph, pool, stream, capture_error_mode: context(
            f"capture on {stream.name}, {pool}, {capture_error_mode}"
        ),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return calls


def test_order_of_the_calls_of_cuda(cuda_calls: list[str]) -> None:
    """The calls are replaced; on a GPU, the test below runs the real ones."""
    gpu = CudaGraphs(torch.device("cuda:1"))
    assert cuda_calls[1:] == ["cuda:1 begins", "new stream", "new stream", "cuda:1 ends"]
    cuda_calls.clear()
    outputs, replay = gpu.capture(lambda: cuda_calls.append("run"))
    replay()
    capture = "capture on stream 1, pool, thread_local"
    assert outputs is None
    assert cuda_calls == ["run", f"{capture} begins", "run", f"{capture} ends", "replay"]
    cuda_calls.clear()

    def called(name: str) -> str:
        cuda_calls.append(name)
        return name

    assert gpu.run_both(lambda: called("first"), lambda: called("second")) == ("first", "second")
    assert cuda_calls == [
        "stream 2 waits for current",
        "stream 2 begins",
        "first",
        "stream 2 ends",
        "second",
        "current waits for stream 2",
    ]
    cuda_calls.clear()
    gpu.wait()
    assert cuda_calls == ["record", "synchronize"]


def test_networks_that_have_graphs(cuda_calls: list[str], halves_model: Callable[..., Any]) -> None:
    class Changed(PanopticFPN):
        """Could predict in another way."""

    ours, changed = small_model(**FEW).eval(), Changed(**SMALL).eval()
    for model, by_default in ((ours, True), (changed, False)):
        for wanted, expected in ((None, by_default), (True, True), (False, False)):
            found = make_graph_predictor(model, wanted, torch.device("cuda"), *EDGES, "all")
            assert isinstance(found, GraphPredictor) == expected
    other = halves_model()
    assert make_graph_predictor(other, None, torch.device("cuda"), *EDGES, "all") is None
    with pytest.raises(
        ValueError, match="graphs: True needs a PanopticFPN, got a HalvesModel; use None or False"
    ):
        make_graph_predictor(other, True, torch.device("cuda"), *EDGES, "all")


def test_a_network_that_cannot_be_captured(cuda_calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = CudaGraphs(torch.device("cuda"))
    for error, expected, message in (
        (
            RuntimeError("operation not permitted"),
            RuntimeError,
            "not permitted; create the Predictor with graphs=False",
        ),
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError, "no memory"),
    ):
        calls = iter((None, error))

        def run() -> None:
            found = next(calls)  # noqa: B023
            if found is not None:
                raise found

        with pytest.raises(expected, match=message):
            gpu.capture(run)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """Replays equal the network on the same inputs, and the host waits once per image."""
    predictor = Predictor(small_model(**FEW), "cuda", dtype, *EDGES, graphs=True)
    graphs = predictor._graphs
    assert graphs is not None
    predictor.warm_up(SIZES)
    for size in SIZES * 2:
        image = photograph(size)
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = graphs(image)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert output is not None
        last = next(reversed(graphs._graphs.values()))
        resized = resize_shortest_edge(image, *EDGES)
        height, width = resized.shape[:2]
        assert torch.equal(
            last.images[0, :, :height, :width].cpu(), torch.from_numpy(resized).permute(2, 0, 1)
        )
        eager = graphs._network.branches(last.images, *last.sizes)
        [expected] = unpad(graphs._network.merge(*eager, (height, width), size))
        on_host = tree_map(lambda value: value.cpu(), expected)
        assert_same(output, on_host)
