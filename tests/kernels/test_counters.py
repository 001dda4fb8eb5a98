"""The counters of launches whose last program combines what all programs stored."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from support.head_calls import call, head_calls

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from panfpn_fast.ops.triton import _conv_choice as conv_choice  # noqa: E402
from panfpn_fast.ops.triton import _counters  # noqa: E402
from panfpn_fast.ops.triton._counters import counters, is_last  # noqa: E402
from panfpn_fast.ops.triton._launch import launch  # noqa: E402
from panfpn_fast.ops.triton._plan import Planned  # noqa: E402

COUNTED = ("conv3x3_statistics", "group_norm_statistics", "upsample_cross_entropy")


@pytest.fixture(autouse=True)
def no_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_counters, "_of_streams", {})
    monkeypatch.setattr(_counters, "_of_captures", {})


@triton.jit
def _sum_kernel(x, partials, total, counter, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    program = tl.program_id(0)
    tl.store(partials + program, tl.sum(tl.load(x + program * BLOCK + tl.arange(0, BLOCK)), 0))
    if is_last(counter, PROGRAMS):
        tl.store(total, tl.sum(tl.load(partials + tl.arange(0, PROGRAMS)), 0) + tl.load(total))


def _sum(x: Tensor) -> Tensor:
    partials, total = x.new_empty(8), torch.zeros((), dtype=x.dtype, device=x.device)
    launch(_sum_kernel, (8,), x, partials, total, counters(x, 1), BLOCK=16, PROGRAMS=8, num_warps=1)
    return total


def test_one_program_is_the_last_in_each_launch(kernel_device: torch.device) -> None:
    planned = Planned(_sum)
    for scale in (1.0, 2.0, 3.0):
        x = scale * torch.arange(128.0, device=kernel_device)
        assert planned(x) == x.sum()
        assert _sum(x) == x.sum()
    assert len(planned._plans) == 1
    (found,) = _counters._of_streams.values()
    assert not found.any()


def test_ops_leave_their_counters_at_zero(triton_ops: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANFPN_CONV", "triton")
    conv_choice.forget()  # plans keep the choice
    for name in COUNTED:
        args = head_calls(4, 6, device=str(triton_ops))[name]
        results = [call(name, args) for _ in range(3)]
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    (found,) = _counters._of_streams.values()
    assert not found.any()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Stands for a GPU: the current device and stream, and whether the stream is being captured."""
    state = {"device": 0, "stream": 7, "capturing": 0}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state["device"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(state["capturing"]))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: state["stream"], raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield state


def test_streams_and_captured_launches_have_counters_of_their_own(
    cuda: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_counters, "_FOR_CAPTURES", 8)
    device = torch.device("cuda", 0)

    def place(count: int) -> tuple[int, int]:
        found = _counters._current(device, count)
        assert found.shape == (count,)
        assert found.dtype == torch.int32
        return id(found._base if found._base is not None else found), int(found.storage_offset())

    first = place(2)
    assert place(3) == place(64) == first  # launches on a stream run one after the other
    cuda["stream"] = 8
    other = place(2)
    assert other[0] != first[0]
    assert place(100)[0] not in (first[0], other[0])  # a larger buffer
    cuda["capturing"] = 1
    captured = [place(count) for count in (3, 2, 3)]
    assert [offset for _, offset in captured] == [0, 3, 5]
    assert len({base for base, _ in captured}) == 1
    assert captured[0][0] not in (first[0], other[0])
    assert place(1)[0] != captured[0][0]  # none is left: the graph makes its own
    cuda["device"] = 1
    assert place(1)[0] != captured[0][0]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")
def test_replays(kernel_device: torch.device) -> None:
    planned = Planned(_sum)
    x = torch.arange(128.0, device=kernel_device)
    planned(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first, second = planned(x), planned(2 * x)
    for scale in (1.0, 3.0):
        x.copy_(scale * torch.arange(128.0))
        graph.replay()
        assert first == x.sum()
        assert second == 2 * x.sum()
