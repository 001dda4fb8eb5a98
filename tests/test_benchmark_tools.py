"""Tests of the report, the comparison of commits and the least ratios of CI, on invented results."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import pkgutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from support.processes import run
from support.repository import repository


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Path:
    return repository(monkeypatch)


def make_row(op: str, case: str, contender: str, milliseconds: float, **extra: Any) -> dict[str, Any]:
    info = {
        "op": op,
        "case": case,
        "contender": contender,
        "device": "A Processor",
        "threads": 2,
        "dtype": "float32",
        "from_20_to_80_percent_ms": [0.9 * milliseconds, 1.1 * milliseconds],
        "bytes": 10**6,
        "flops": 10**7,
        "gb_per_s": 1e-3 / milliseconds * 1e3,
        "gflop_per_s": 10 / milliseconds,
        "copy_gb_per_s": 10.0,
        "share_of_copy": 0.1 / milliseconds,
        "matmul_gflop_per_s": 200.0,
        "share_of_matmul": 0.05 / milliseconds,
        "peak_memory_bytes": 2_000_000,
    }
    return {
        "group": f"{op}: {case} (cpu)",
        "name": contender,
        "stats": {"median": milliseconds / 1e3},
        "extra_info": {**info, **extra},
    }


def make_results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "machine_info": {"panfpn_fast": {"torch": "2.15.0"}},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-11-21T04:12:15+00:00",
        "benchmarks": rows,
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    stages = {"backbone": 60.0, "merge": 5.5}
    rows = [
        make_row("nms", "1000 boxes", "ours", 0.5, highlight=True),
        make_row("nms", "1000 boxes", "torchvision", 24.0, highlight=True),
        make_row("nms", "1000 boxes", "a slow one", 240.0),
        make_row("paste_masks", "large", "ours", 20.0, highlight=False),
        make_row("paste_masks", "large", "eager", 15.0),
        make_row("conv", "alone", "ours", 1.0, highlight=True),
        make_row(
            "shared network",
            "R-50",
            "ours",
            100.0,
            parameters=48_000_000,
            saved_for_backward_bytes=[10**9],
            highlight=True,
        ),
        make_row(
            "shared network",
            "R-50",
            "two networks",
            200.0,
            parameters=80_000_000,
            saved_for_backward_bytes=[10**9, 10**9],
        ),
        make_row("end to end", "R-50", "ours", 70.0, images_per_s=14.3, stages_ms=stages),
        make_row("end to end", "R-50", "eager", 140.0, images_per_s=7.1, stages_ms={"backbone": 99}),
        {"group": None, "name": "another", "stats": {"median": 1.0}, "extra_info": {}},
    ]
    path = tmp_path / "device" / "cpu.json"
    path.parent.mkdir()
    path.write_text(json.dumps(make_results(rows)))
    return path


def test_groups_and_ratios(root: Path, results: Path) -> None:
    from benchmarks.scripts.report.results import read_runs

    [run] = read_runs(results)
    assert run.name == "device/cpu"
    assert run.provenance == (
        "A Processor, 2 threads, torch 2.15.0, commit 0123456789, 2026-11-21, "
        "separate rounds, so a ratio is that of two medians"
    )
    assert [group.op for group in run.ops] == ["nms", "paste_masks", "conv"]
    assert run.ops[0].fastest.contender == "torchvision"
    assert run.ops[0].ratio(run.ops[0].fastest) == pytest.approx(48)
    assert [(group.op, peer.contender) for group, peer in run.losses] == [("paste_masks", "eager")]
    assert [group.op for group in run.networks] == ["end to end"]
    # "conv" has no peer to compare with.
    assert [group.op for group in run.highlights] == ["shared network", "nms"]


def test_page_shows_everything_and_losses_first(root: Path, results: Path) -> None:
    from benchmarks.scripts.report.pages import performance_page, plot_names
    from benchmarks.scripts.report.results import read_runs

    [run] = read_runs(results)
    text = performance_page([run])
    assert text == performance_page(read_runs(results))
    assert "The peer is faster in 1 of 5 comparisons:" in text
    assert (
        "| `nms` | 1000 boxes | float32 | 0.500 | 0.450 to 0.550 | torchvision | 24.0 | 48.0 | 2.00 | 2.00 |"
        in text
    )
    assert (
        "| `paste_masks` | large | float32 | 20.0 | 18.0 to 22.0 | eager | 15.0 | **0.75** | 2.00 | 2.00 |"
        in text
    )
    assert "| `conv` | alone | float32 | 1.00 | 0.900 to 1.10 | none |  |  | 2.00 |  |" in text
    assert "60% of the parameters, 100% of the FLOPs, 50% of the tensors kept for backward" in text
    assert "100% of the peak memory, 50% of the time of two networks" in text
    # No row has a stride, so that column is missing.
    assert (
        "| shared network | R-50 | two networks | 80.0 | 0.0100 | 2,000 | 2.00 | 200 | 0.0% | 2.00 |" in text
    )
    assert "| end to end | R-50 | eager | 99.0 |  |" in text
    assert "multiplies large matrices at 200 GFLOP/s in float32, measured" in text
    assert "| `nms` | 1000 boxes | 1.00 | 10.0 | 2.00 | 20.0% | 20.0 | 10.0% |" in text
    assert plot_names(run) == ["highlights", "ratios", "roofline", "shared", "stages"]


def test_training_has_its_own_tables(root: Path, tmp_path: Path) -> None:
    from benchmarks.scripts.report.pages import performance_page
    from benchmarks.scripts.report.results import read_runs

    loading = {"workers": 2, "images": 16}
    rows = [
        make_row("data loading", "photographs, 2 workers", "ours", 400.0, images_per_s=40.0, **loading),
        make_row(
            "data loading", "photographs, 2 workers", "torchvision", 800.0, images_per_s=20.0, **loading
        ),
        make_row(
            "training step", "R-50", "ours", 900.0, parameters=10**6, step_ms={"load": 30, "forward": 300}
        ),
        make_row("training step", "R-50", "eager", 1800.0, parameters=10**6, step_ms={"forward": 700.0}),
    ]
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(make_results(rows)))
    [run] = read_runs(path)
    assert run.ops == run.metered == []
    assert [group.op for group in run.networks] == ["training step"]
    text = performance_page([run])
    assert "| photographs, 2 workers | 16 | 40.0 | torchvision | 20.0 | 2.00 | 2.00 | 2.00 |" in text
    steps = text.split("### Where a training step's time goes")[1].splitlines()
    assert "| benchmark | case | network | load, ms | forward, ms |" in steps
    assert "| training step | R-50 | ours | 30.0 | 300 |" in steps
    assert "| training step | R-50 | eager |  | 700 |" in steps


@pytest.fixture
def interleaved(tmp_path: Path) -> Path:
    """Results in which the medians of all rounds suggest other ratios than the rounds."""
    ratios = {"eager": 2.0, "engine": 0.5}
    ends = {"eager": [1.9, 2.1], "engine": [0.45, 12.0]}
    of_variant = {"eager": 4.0, "engine": 1.25}
    rows = [
        make_row(
            "net", "R-50", "ours", 10.0, ratio_to=ratios, ratio_to_from_20_to_80_percent=ends, highlight=True
        ),
        make_row("net", "R-50", "ours, compiled", 9.0, ratio_to=of_variant, times_ours=0.5),
        *(
            make_row(
                "net",
                "R-50",
                name,
                9.5,
                times_ours=ratios[name],
                times_ours_from_20_to_80_percent=ends[name],
            )
            for name in ratios
        ),
    ]
    for row in rows:
        row["extra_info"] |= {"rounds": "interleaved", "parameters": 10**6}
    path = tmp_path / "device" / "cpu.json"
    path.parent.mkdir()
    path.write_text(json.dumps(make_results(rows)))
    return path


def test_ratios_of_interleaved_rounds(root: Path, interleaved: Path) -> None:
    from benchmarks.scripts.report.pages import performance_page, readme_with_figures
    from benchmarks.scripts.report.results import read_runs

    [run] = read_runs(interleaved)
    [group] = run.groups
    assert run.provenance.endswith("2026-11-21, interleaved rounds")
    assert group.fastest.contender == "engine"
    assert [(group.ratio(peer), group.range(peer)) for peer in group.peers] == [
        (2.0, [1.9, 2.1]),
        (0.5, [0.45, 12.0]),
    ]
    text = performance_page([run])
    assert "- net, R-50: engine takes **0.50** of our time" in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| net |")]
    assert [line[-2:] for line in lines] == [
        ["", " |"],
        ["1.25 (engine)", " |"],
        ["2.00", "1.90 to 2.10 |"],
        ["**0.50**", "0.45 to 12.0 |"],
    ]
    text = "<!-- begin figures: device/cpu.json -->\n<!-- end figures -->\n"
    written = readme_with_figures(text, interleaved.parents[1])
    assert "| net | R-50 | 10.0 | engine | 9.50 | **0.50** | 0.45 to 12.0 |" in written


def test_rounds_are_interleaved(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.harness import rounds
    from benchmarks.harness.rounds import Timing, ratio, time_interleaved

    def pretend(device: torch.device, call: Any) -> tuple[int, float]:
        call()
        return 0, 1e-6

    monkeypatch.setattr(rounds, "peak_memory", pretend)
    called: list[str] = []
    calls = {name: (lambda name=name: called.append(name)) for name in ("a", "b")}
    found = time_interleaved(calls, torch.device("cpu"), max_seconds=0.0, min_rounds=4)  # type: ignore[arg-type]
    assert all(len(timing.seconds) == 4 and timing.calls == 100 for timing in found.values())
    turns = [name for name, _ in itertools.groupby(called[4:])]
    assert turns == ["a", "b", "a", "b", "a"]  # the first in each round is the last of the round before
    assert called.count("a") == called.count("b") == 402

    # The machine takes twice as long in the last rounds.
    ours = Timing((1.0, 1.0, 2.0, 2.0, 2.0), 1, None)
    theirs = Timing((3.0, 3.0, 6.0, 6.0, 5.0), 1, None)
    assert ratio(theirs, ours).median == 3
    assert ratio(theirs, ours).ends == pytest.approx((2.9, 3))


def test_benchmarks_report_the_times_of_the_rounds(root: Path) -> None:
    from benchmarks.harness.rounds import Timing, replay, replayed

    reported: list[float] = []

    class Benchmark:
        def pedantic(self, target: Any, rounds: int, iterations: int) -> None:
            for _ in range(rounds):
                start = replayed()
                for _ in range(iterations):
                    target()
                reported.append((replayed() - start) / iterations)

    replay(Benchmark(), Timing((0.25, 0.5, 0.125), 7, None))
    assert reported == pytest.approx([0.25, 0.5, 0.125])


def test_engines_that_cannot_run_are_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.harness import engines

    cpu = torch.device("cpu")
    for name, module in (("ONNX Runtime", "onnxruntime"), ("OpenVINO", "openvino")):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        problem = engines.problem.__wrapped__(name, cpu)
        assert f'{name} needs the extra [bench-engines]: pip install ".[bench-engines]"' in str(problem)
        assert "CPU only" in str(engines.problem.__wrapped__(name, torch.device("cuda")))
    problem = engines.problem.__wrapped__("ONNX Runtime", cpu, torch.bfloat16)
    assert problem == "ONNX Runtime has no bfloat16 convolutions on the CPU"


def test_a_stage_excludes_the_stages_within_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.harness import stages
    from benchmarks.harness.stages import Part, stage_seconds

    clock = SimpleNamespace(now=0.0)

    class Network:
        def inner(self) -> None:
            clock.now += 2

        def outer(self) -> None:
            clock.now += 4
            self.inner()
            self.inner()

    network = Network()

    def call() -> None:
        clock.now += 1
        network.outer()
        network.inner()

    monkeypatch.setattr(stages, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    parts = [Part(network, "inner", "backbone"), Part(network, "outer", "fpn")]
    assert stage_seconds(call, parts, torch.device("cpu")) == {"backbone": 6, "fpn": 4, "rest": 1}


def test_close_norm(root: Path) -> None:
    from benchmarks.harness.agreement import close_norm

    ours = (torch.full((10,), 1.0), torch.full((10,), 1.001))
    theirs = (torch.ones(10), torch.ones(10))
    close_norm(0.0011)(ours, theirs)
    with pytest.raises(AssertionError, match=r"result 1: relative difference 0\.001, at most 0\.0009"):
        close_norm(0.0009)(ours, theirs)
    with pytest.raises(AssertionError, match="shape"):
        close_norm(1.0)(ours, (torch.ones(10), torch.ones(1)))


def test_readme_shows_the_fastest_peer_and_detectron2(root: Path, tmp_path: Path) -> None:
    from benchmarks.scripts.report.pages import readme_with_figures

    names = {"ours": 1.0, "eager": 3.0, "OpenVINO": 2.0, "detectron2 0.6": 4.0}
    rows = [
        make_row("prediction", "R-50", name, ms, parameters=10**6, highlight=True)
        for name, ms in names.items()
    ]
    (tmp_path / "cpu.json").write_text(json.dumps(make_results(rows)))
    written = readme_with_figures("<!-- begin figures: cpu.json -->\n<!-- end figures -->\n", tmp_path)
    lines = [line for line in written.splitlines() if line.startswith("| prediction |")]
    assert lines == [
        "| prediction | R-50 | 1.00 | OpenVINO | 2.00 | 2.00 |",
        "| prediction | R-50 | 1.00 | detectron2 0.6 | 4.00 | 4.00 |",
    ]


def test_readme_is_changed_between_its_markers_only(root: Path, results: Path) -> None:
    from benchmarks.scripts.report.pages import readme_with_figures

    begin = "<!-- begin figures: device/cpu.json -->"
    text = f"before\n\n{begin}\nold\n<!-- end figures -->\n\nafter\n"
    written = readme_with_figures(text, results.parents[1])
    assert written.startswith(f"before\n\n{begin}\n")
    assert written.endswith("\n<!-- end figures -->\n\nafter\n")
    assert "old" not in written
    assert "| `nms` | 1000 boxes | 0.500 | torchvision | 24.0 | 48.0 |" in written
    assert "The peer is faster in 1 of 5 comparisons:" in written
    assert readme_with_figures(written, results.parents[1]) == written


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"benchmarks": [{"extra_info": {"op": "nms"}}]}'])
def test_damaged_results_are_named(root: Path, tmp_path: Path, text: str) -> None:
    from benchmarks.scripts.report.results import ResultsError, read_runs

    path = tmp_path / "damaged.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=r"damaged\.json is not the JSON of a benchmark run"):
        read_runs(path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (0.07634, "0.0763"),
        (4.543, "4.54"),
        (9.999, "10.0"),
        (89.46, "89.5"),
        (4543.2, "4,543"),
    ],
)
def test_significant(root: Path, value: float, text: str) -> None:
    from benchmarks.scripts.report.pages import significant

    assert significant(value) == text


def test_the_command_draws_every_plot_and_the_same_twice(root: Path, results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    files: list[dict[str, bytes]] = []
    for name in ("first", "second"):
        out = tmp_path / name
        out.mkdir()
        run([sys.executable, "-m", "benchmarks.scripts.report", results, "--out", out], cwd=root)
        files.append(
            {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        )
    assert files[0] == files[1]
    plots = {f"images/benchmarks/device/cpu/{name}.svg" for name in PLOTS}
    assert set(files[0]) == {"performance.md", *plots}

    for name in plots:
        svg = files[0][name].decode()
        assert "prefers-color-scheme: dark" in svg
        assert "sans-serif" in svg
        assert "DejaVu" not in svg


PLOTS = ("highlights", "ratios", "roofline", "shared", "stages")


def test_comparison_of_two_commits(root: Path) -> None:
    from benchmarks.scripts.compare import table

    before = {("nms: 1000 boxes (cpu)", "ours"): 0.002, ("nms: 1000 boxes (cpu)", "torchvision"): 0.004}
    after = {("nms: 1000 boxes (cpu)", "ours"): 0.001, ("merge (cpu)", "ours"): 12.0}
    assert table(before, after) == [
        "                                    before ms     now ms  speed-up",
        "nms: 1000 boxes (cpu)  ours             2.000      1.000      2.00",
        "merge (cpu)  ours                           -  12000.000         -",
        "nms: 1000 boxes (cpu)  torchvision      4.000          -         -",
    ]
    assert table({}, {}) == ["  before ms  now ms  speed-up"]


def load_check_ratios(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_ratios", root / ".ci" / "check_ratios.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_too_small_and_missing_ratios_are_reported(root: Path) -> None:
    if not (root / ".ci" / "check_ratios.py").is_file():
        pytest.skip(".ci is not next to tests/")
    module = load_check_ratios(root)
    row = make_row("nms", "1000 boxes", "ours", 0.5, ratio_to={"torchvision": 4.0, "broken": float("nan")})
    variant = make_row("nms", "1000 boxes", "ours, compiled", 0.5, ratio_to={"torchvision": 1.0})
    found = make_results([row, variant, make_row("nms", "1000 boxes", "torchvision", 2.0)])
    assert module.failures(found, {row["group"]: {"torchvision": 3.9}}) == []
    [line] = module.failures(found, {row["group"]: {"torchvision": 4.1}})
    assert line == "nms: 1000 boxes (cpu): 4.00 times as fast as torchvision, expected at least 4.1"
    assert len(module.failures(found, {row["group"]: {"broken": 1}})) == 1
    [line] = module.failures(found, {"merge": {"detectron2": 1}})
    assert line == "merge: was not measured together with detectron2"
    minimal = json.loads(module.MINIMAL.read_text())
    assert all(least >= 1 for peers in minimal.values() for least in peers.values())


@pytest.mark.parametrize(
    ("device", "cores", "directory"),
    [
        ("Intel(R) Xeon(R) Processor @ 2.50GHz", 2, "intel-xeon-2.5ghz-2-cores"),
        ("NVIDIA H200", None, "nvidia-h200"),
        ("AMD EPYC 7763 64-Core Processor", 16, "amd-epyc-7763-64-core-16-cores"),
    ],
)
def test_directories_are_named_after_devices(
    root: Path, device: str, cores: int | None, directory: str
) -> None:
    from benchmarks.scripts.record import directory_name

    assert directory_name(device, cores) == directory


def test_failed_benchmarks_keep_the_previous_results(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.scripts import record

    target = tmp_path / "device" / "cpu.json"
    target.parent.mkdir()
    target.write_text("before")
    monkeypatch.setattr(record, "_target", lambda options: target)
    monkeypatch.setattr(record, "ROOT", tmp_path)  # has no benchmarks
    monkeypatch.setattr(sys, "argv", ["record", "-q"])
    assert record.main() != 0
    assert target.read_text() == "before"
    assert list(target.parent.iterdir()) == [target]
    assert "cpu.json is unchanged" in capsys.readouterr().out


def test_every_op_and_every_least_ratio_has_a_benchmark(root: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    from benchmarks import networks, ops
    from benchmarks.harness.comparison import OURS, Comparison
    from benchmarks.scripts.report.ops_table import op_names

    comparisons = [
        value
        for package in (ops, networks)
        for found in pkgutil.iter_modules(package.__path__)
        for value in vars(importlib.import_module(f"{package.__name__}.{found.name}")).values()
        if isinstance(value, Comparison)
    ]
    assert {comparison.op for comparison in comparisons} >= set(op_names())
    if not (root / ".ci" / "check_ratios.py").is_file():
        pytest.skip(".ci is not next to tests/")
    minimal = json.loads(load_check_ratios(root).MINIMAL.read_text())
    timed = {
        (f"{comparison.op}: {case.name} (cpu)", contender)
        for comparison in comparisons
        for case in comparison.cases
        for contender in (OURS, *(peer.name for peer in comparison.peers if peer.sample is None))
        if not case.full
    }
    assert timed >= {(group, peer) for group, peers in minimal.items() for peer in peers}
