"""The choice between convolutions: what is asked first, what is kept, and what may not be measured."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")
from panfpn_fast.kernels import conv3x3_statistics as conv
from panfpn_fast.kernels import conv_choice
from panfpn_fast.kernels.conv_choice import CUDNN, Problem, __main__, choose, size_class

PROBLEM = Problem("NVIDIA H200", "bfloat16", 65536, 256, 128)
NAMES = ("ours", "other", CUDNN)


class Timer:
    """A timer that runs each call and says what it is told to."""

    def __init__(self, *times: float) -> None:
        self.times = times
        self.runs = 0

    def __call__(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        self.runs += 1
        assert [call() for call in calls] == [f"ran {name}" for name in NAMES]
        return list(self.times)


def run(name: str) -> str:
    return f"ran {name}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own, and no decision from before."""
    monkeypatch.setenv("PANFPN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PANFPN_CONV", raising=False)
    conv_choice.forget()
    yield tmp_path / "cache" / "conv_choice.json"
    conv_choice.forget()


def table(path: Path, choices: dict[str, Any], **rest: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": 1, "choices": choices, **rest}))


def test_measures_once_and_keeps_it(cache: Path) -> None:
    timer = Timer(3.0, 1.0, 2.0)
    assert choose(PROBLEM, NAMES, run, timer) == "other"
    assert choose(PROBLEM, NAMES, run, Timer(0.0, 1.0, 2.0)) == "other"
    conv_choice.forget()  # as another process
    assert choose(PROBLEM, NAMES, run, timer) == "other"
    assert choose(PROBLEM, NAMES, None) == "other"
    assert timer.runs == 1
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    assert json.loads(cache.read_text())["choices"] == {
        "NVIDIA H200": {conv_choice.versions(): {PROBLEM.key: "other"}}
    }


def test_finding_is_for_one_gpu_and_one_set_of_versions(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(PROBLEM, NAMES, run, Timer(1.0, 2.0, 3.0)) == "ours"
    elsewhere = Problem("NVIDIA A100", "bfloat16", 65536, 256, 128)
    assert choose(elsewhere, NAMES, run, Timer(2.0, 1.0, 3.0)) == "other"
    conv_choice.forget()
    before = conv_choice.versions()
    monkeypatch.setattr(conv_choice, "versions", lambda: "later versions")
    assert choose(PROBLEM, NAMES, run, Timer(3.0, 2.0, 1.0)) == CUDNN
    assert json.loads(cache.read_text())["choices"] == {
        "NVIDIA H200": {before: {PROBLEM.key: "ours"}, "later versions": {PROBLEM.key: CUDNN}},
        "NVIDIA A100": {before: {elsewhere.key: "other"}},
    }


def test_versions_are_named() -> None:
    triton = pytest.importorskip("triton")
    for package in (torch, triton):
        assert package.__version__ in conv_choice.versions()


def test_shipped_table_comes_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_choice, "_TABLE", tmp_path / "table.json")
    now = conv_choice.versions()
    known = {PROBLEM.key: "other"}
    table(cache, {"NVIDIA H200": {now: {PROBLEM.key: "ours"}}})
    table(tmp_path / "table.json", {"NVIDIA H200": {"other versions": known}}, made="by hand")
    assert choose(PROBLEM, NAMES, None) == "other"
    # Of several versions this one's is taken.
    conv_choice.forget()
    table(tmp_path / "table.json", {"NVIDIA H200": {"others": known, now: {PROBLEM.key: CUDNN}}})
    assert choose(PROBLEM, NAMES, None) == CUDNN
    # It is of one GPU only.
    conv_choice.forget()
    table(tmp_path / "table.json", {"NVIDIA A100": {now: known}})
    assert choose(PROBLEM, NAMES, None) == "ours"


def test_shipped_table_is_readable() -> None:
    content = json.loads(conv_choice._TABLE.read_text())
    assert content["format"] == 1
    for by_versions in conv_choice.read_choices(conv_choice._TABLE).values():
        for by_problem in by_versions.values():
            assert set(by_problem.values()) <= {CUDNN, *conv._CONFIGURATIONS}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "17",
        "\udcff",
        '{"format": 1}',
        '{"format": 2, "choices": {}}',
        '{"format": 1, "choices": []}',
        '{"format": 1, "choices": {"NVIDIA H200": []}}',
        '{"format": 1, "choices": {"NVIDIA H200": {"versions": "ours"}}}',
        '{"format": 1, "choices": {"NVIDIA H200": {"versions": {"bfloat16": 3}}}}',
    ],
)
def test_damaged_file_is_ignored_and_written_anew(content: str, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match="conv_choice.json: ignored"):
        assert choose(PROBLEM, NAMES, run, Timer(2.0, 1.0, 3.0)) == "other"
    conv_choice.forget()
    assert choose(PROBLEM, NAMES, None) == "other"


def test_name_that_is_no_implementation_is_ignored(cache: Path) -> None:
    table(cache, {"NVIDIA H200": {conv_choice.versions(): {PROBLEM.key: "of a later version"}}})
    assert choose(PROBLEM, NAMES, run, Timer(2.0, 1.0, 3.0)) == "other"


def test_findings_of_other_processes_are_kept(cache: Path) -> None:
    other = Problem("NVIDIA H200", "bfloat16", 4096, 256, 128)
    assert choose(PROBLEM, NAMES, run, Timer(2.0, 1.0, 3.0)) == "other"
    choices = json.loads(cache.read_text())["choices"]
    choices["NVIDIA H200"][conv_choice.versions()] = {other.key: CUDNN}
    table(cache, choices)  # another process has written meanwhile
    third = Problem("NVIDIA H200", "bfloat16", 256, 256, 128)
    assert choose(third, NAMES, run, Timer(2.0, 3.0, 1.0)) == CUDNN
    known = conv_choice.read_choices(cache)["NVIDIA H200"][conv_choice.versions()]
    assert known == {other.key: CUDNN, third.key: CUDNN}


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PANFPN_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="was not kept"):
        assert choose(PROBLEM, NAMES, run, Timer(2.0, 1.0, 3.0)) == "other"


def test_what_fails_is_not_chosen(cache: Path) -> None:
    assert choose(PROBLEM, NAMES, run, Timer(math.inf, 2.0, math.inf)) == "other"
    other = Problem("NVIDIA H200", "float16", 65536, 256, 128)
    assert choose(other, NAMES, run, Timer(math.inf, math.inf, math.inf)) == "ours"
    assert f'"{other.key}"' not in cache.read_text()


def test_first_decision_stands() -> None:
    timer = Timer(3.0, 1.0, 2.0)
    assert choose(PROBLEM, NAMES, None) == "ours"  # traced, say
    assert choose(PROBLEM, NAMES, run, timer) == "ours"
    assert timer.runs == 0


def test_threads_measure_once() -> None:
    runs = []

    def slow(calls: Sequence[Callable[[], object]]) -> list[float]:
        runs.append(len(calls))
        time.sleep(0.05)
        return [3.0, 1.0, 2.0]

    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(choose(PROBLEM, NAMES, run, slow))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["other"] * 4
    assert runs == [3]


@pytest.mark.parametrize(
    ("mode", "expected"), [("measure", "other"), ("known", "ours"), ("triton", "ours"), ("cudnn", CUDNN)]
)
def test_environment_variable(mode: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANFPN_CONV", mode)
    assert choose(PROBLEM, NAMES, run, Timer(3.0, 1.0, 2.0)) == expected


def test_environment_variable_with_another_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANFPN_CONV", "fastest")
    with pytest.raises(
        ValueError, match="PANFPN_CONV: expected one of measure, known, triton, cudnn, got 'fastest'"
    ):
        choose(PROBLEM, NAMES, run, Timer(3.0, 1.0, 2.0))


def test_one_implementation_needs_no_measurement() -> None:
    timer = Timer(1.0)
    assert choose(PROBLEM, (CUDNN,), run, timer) == CUDNN
    assert timer.runs == 0


def test_sizes_left_open_are_not_recorded(cache: Path) -> None:
    timer = Timer(3.0, 1.0, 2.0)
    assert choose(Problem("NVIDIA H200", "bfloat16", None, 256, 128), NAMES, run, timer) == "ours"
    assert timer.runs == 0
    assert not cache.exists()


def test_size_classes() -> None:
    assert [size_class(n) for n in (0, 1, 2, 3, 4, 5, 6, 8, 11, 12)] == [0, 1, 2, 3, 4, 4, 6, 8, 8, 12]
    assert size_class(200 * 336) == 65536
    for pixels in range(1, 5000):
        lower = size_class(pixels)
        assert size_class(lower) == lower
        assert lower <= pixels < lower * math.sqrt(2) + 1


class Clock:
    """Stands in for torch.cuda: what is called takes as long as it says, and launches take time of the host's."""

    def __init__(self) -> None:
        self.now = 0.0
        self.synchronised = False

    def call(self, milliseconds: Sequence[float]) -> Callable[[], None]:
        times = iter(milliseconds)

        def run() -> None:
            self.now += next(times)

        return run

    def Event(self, enable_timing: bool) -> Clock.Moment:
        assert enable_timing
        return Clock.Moment(self)

    class Moment:
        def __init__(self, clock: Clock) -> None:
            self.clock = clock

        def record(self) -> None:
            self.time = self.clock.now

        def elapsed_time(self, later: Clock.Moment) -> float:
            assert self.clock.synchronised
            return later.time - self.time

    def _sleep(self, cycles: int) -> None:
        self.now += 1.0

    def current_stream(self) -> Clock:
        return self

    def synchronize(self) -> None:
        self.synchronised = True


def test_timer_takes_the_least_after_warming_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(torch, "cuda", clock)

    def failing() -> None:
        raise RuntimeError("out of memory")

    calls = [clock.call([0.1, 4, 3, 5, 3, 4]), failing, clock.call([900, 1, 9, 2, 2, 2])]
    assert conv_choice.time_on_gpu(calls) == pytest.approx([3, math.inf, 1])


def test_what_may_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda = True

    class Traced(OnGpu):
        pass

    deterministic, capturing = False, False
    monkeypatch.setattr(conv, "Tensor", OnGpu)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    may_measure: Any = conv._may_measure
    assert may_measure(OnGpu())
    assert not may_measure(Traced())
    capturing = True
    assert not may_measure(OnGpu())
    deterministic, capturing = True, False
    assert not may_measure(OnGpu())


def test_traced_and_cpu_tensors_are_not_measured() -> None:
    assert not conv._may_measure(torch.empty(1))
    with FakeTensorMode():
        assert not conv._may_measure(torch.empty(1, device="cuda"))


def rank(
    pixels: int | None, precision: str = "bfloat16", channels: tuple[int, int] = (256, 128), major: int = 9
) -> tuple[str, ...]:
    return conv.rank(Problem(None, precision, pixels, *channels), conv._Gpu(major=major))


def test_rule() -> None:
    # The semantic head's sizes for 800 x 1344 on an H200: the largest tiles that occupy it.
    assert rank(size_class(200 * 336)) == ("256x128-8-3", "128x128-4-3", CUDNN)
    assert rank(size_class(100 * 168)) == ("128x128-4-3", "256x128-8-3", "64x128-4-4", CUDNN)
    assert rank(size_class(50 * 84)) == ("64x64-4-4", "64x128-4-4", CUDNN)
    assert rank(size_class(25 * 42)) == ("64x64-4-4", "64x128-4-4", CUDNN)
    assert rank(size_class(200 * 336), channels=(256, 256))[0] == "128x256-8-3"
    assert rank(size_class(200 * 336), channels=(64, 64))[0] == "128x64-4-4"
    assert rank(size_class(200 * 336), "tf32")[0] == "256x128-8-3"
    assert rank(None)[0] == "128x128-4-3"
    # Others have less shared memory.
    assert rank(size_class(200 * 336), major=8)[0] == "128x128-8-4"
    assert rank(size_class(200 * 336), major=12)[0] == "128x128-8-4"
    # cuDNN where there are no tensor cores or they cannot be fed.
    assert rank(65536, "float32") == (CUDNN, "64x64-4-3")
    assert rank(65536, channels=(3, 64)) == (CUDNN,)
    assert rank(65536, channels=(64, 54)) == (CUDNN,)
    assert rank(65536, major=7) == (CUDNN,)


def test_precision_is_that_of_torchs_convolutions() -> None:
    assert conv._precision(torch.bfloat16) == "bfloat16"
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert conv._precision(torch.float32) == "tf32"
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert conv._precision(torch.float32) == "float32"


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        batch, height, width, *channels = shape
        problem = Problem(
            "NVIDIA H200", conv._precision(dtype), size_class(batch * height * width), *channels
        )
        return problem, {"ours": 0.25, CUDNN: 0.125 if dtype == torch.float32 else math.inf}

    monkeypatch.setattr(conv, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    path = tmp_path / "table.json"
    table(path, {"NVIDIA A100": {"versions": {PROBLEM.key: "ours"}}})
    with torch.backends.cudnn.flags():
        assert __main__.main(["--save", str(path), "--precision", "bfloat16", "tf32"]) == 0
    printed = capsys.readouterr().out
    assert f"{PROBLEM.key}: ours 0.2500 ms, cudnn inf ms\n" in printed
    content = json.loads(path.read_text())
    assert content["choices"]["NVIDIA A100"] == {"versions": {PROBLEM.key: "ours"}}
    measured = content["choices"]["NVIDIA H200"][conv_choice.versions()]
    assert measured[PROBLEM.key] == "ours"
    assert {name for key, name in measured.items() if key.startswith("tf32")} == {CUDNN}
    # Each class of sizes once.
    sizes = {size_class(n) for n in range(256, 1 << 20, 64)}
    assert len(measured) == 2 * 5 * len(sizes) == printed.count("\n")
    assert "conv_choice --save" in content["made"]


def test_command_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert __main__.main([]) == 1
    assert "no CUDA GPU" in capsys.readouterr().err
