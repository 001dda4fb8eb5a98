"""The report, the comparison of commits, and the least ratios of CI, on invented results."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from repository import repository


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
        make_row("nms", "1000 boxes", "ours", 0.5),
        make_row("nms", "1000 boxes", "torchvision", 24.0),
        make_row("nms", "1000 boxes", "a slow one", 240.0),
        make_row("paste_masks", "large", "ours", 20.0),
        make_row("paste_masks", "large", "eager", 15.0),
        make_row("conv", "alone", "ours", 1.0),
        make_row(
            "shared network", "R-50", "ours", 100.0, parameters=48_000_000, saved_for_backward_bytes=[10**9]
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
    from benchmarks.report.results import read_runs

    [run] = read_runs(results)
    assert run.name == "device/cpu"
    assert run.provenance == "A Processor, 2 threads, torch 2.15.0, commit 0123456789, 2026-11-21"
    assert [group.op for group in run.ops] == ["nms", "paste_masks", "conv"]
    assert run.ops[0].fastest.contender == "torchvision"
    assert run.ops[0].ratio(run.ops[0].fastest) == pytest.approx(48)
    assert [(group.op, peer.contender) for group, peer in run.losses] == [("paste_masks", "eager")]
    assert [group.op for group in run.networks] == ["end to end"]
    # Another case stands in for the one that the README shows.
    assert [group.case for group in run.highlights] == ["1000 boxes", "large", "R-50"]


def test_page_shows_everything_and_losses_first(root: Path, results: Path) -> None:
    from benchmarks.report.pages import performance_page, plot_names
    from benchmarks.report.results import read_runs

    [run] = read_runs(results)
    text = performance_page([run])
    assert text == performance_page(read_runs(results))
    assert "In 1 of the 5 comparisons the peer is faster:" in text
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
    # No row has a stride, so there is no such column.
    assert (
        "| shared network | R-50 | two networks | 80.0 | 0.0100 | 2,000 | 2.00 | 200 | 0.0% | 2.00 |" in text
    )
    assert "| end to end | R-50 | eager | 99.0 |  |" in text
    assert "multiplies large matrices at 200 GFLOP/s in float32, measured" in text
    assert "| `nms` | 1000 boxes | 1.00 | 10.0 | 2.00 | 20.0% | 20.0 | 10.0% |" in text
    assert plot_names(run) == ["highlights", "ratios", "roofline", "shared", "stages"]


def test_readme_is_changed_between_its_markers_only(root: Path, results: Path) -> None:
    from benchmarks.report.pages import readme_with_figures

    begin = "<!-- Figures of device/cpu.json, by python -m benchmarks.report -->"
    text = f"before\n\n{begin}\nold\n<!-- End of figures -->\n\nafter\n"
    written = readme_with_figures(text, results.parents[1])
    assert written.startswith(f"before\n\n{begin}\n")
    assert written.endswith("\n<!-- End of figures -->\n\nafter\n")
    assert "old" not in written
    assert "| `nms` | 1000 boxes | 0.500 | torchvision | 24.0 | 48.0 |" in written
    assert "In 1 of the 5 comparisons the peer is faster:" in written
    assert readme_with_figures(written, results.parents[1]) == written


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"benchmarks": [{"extra_info": {"op": "nms"}}]}'])
def test_damaged_results_are_named(root: Path, tmp_path: Path, text: str) -> None:
    from benchmarks.report.results import ResultsError, read_runs

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
    from benchmarks.report.pages import significant

    assert significant(value) == text


def test_the_command_draws_every_plot_and_the_same_twice(root: Path, results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    files: list[dict[str, bytes]] = []
    for name in ("first", "second"):
        out = tmp_path / name
        out.mkdir()
        subprocess.run(
            [sys.executable, "-m", "benchmarks.report", results, "--out", out], cwd=root, check=True
        )
        files.append(
            {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        )
    assert files[0] == files[1]
    plots = {
        f"images/benchmarks/device/cpu/{name}-{mode}.png" for name in PLOTS for mode in ("light", "dark")
    }
    assert set(files[0]) == {"performance.md", *plots}


PLOTS = ("highlights", "ratios", "roofline", "shared", "stages")


def test_comparison_of_two_commits(root: Path) -> None:
    from benchmarks.compare import table

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


def test_too_small_and_missing_ratios_are_told(root: Path) -> None:
    if not (root / ".ci" / "check_ratios.py").is_file():
        pytest.skip(".ci is not beside tests/")
    module = load_check_ratios(root)
    row = make_row("nms", "1000 boxes", "ours", 0.5, ratio_to={"torchvision": 4.0, "broken": float("nan")})
    found = make_results([row, make_row("nms", "1000 boxes", "torchvision", 2.0)])
    assert module.failures(found, {row["group"]: {"torchvision": 3.9}}) == []
    [line] = module.failures(found, {row["group"]: {"torchvision": 4.1}})
    assert line == "nms: 1000 boxes (cpu): 4.00 times as fast as torchvision, at least 4.1 is expected"
    assert len(module.failures(found, {row["group"]: {"broken": 1}})) == 1
    [line] = module.failures(found, {"merge": {"detectron2": 1}})
    assert line == "merge: was not measured beside detectron2"
    minimal = json.loads(module.MINIMAL.read_text())
    assert all(least >= 1 for peers in minimal.values() for least in peers.values())


@pytest.mark.parametrize(
    ("device", "cores", "folder"),
    [
        ("Intel(R) Xeon(R) Processor @ 2.50GHz", 2, "intel-xeon-2.5ghz-2-cores"),
        ("NVIDIA H200", None, "nvidia-h200"),
        ("AMD EPYC 7763 64-Core Processor", 16, "amd-epyc-7763-64-core-16-cores"),
    ],
)
def test_folders_are_named_after_devices(root: Path, device: str, cores: int | None, folder: str) -> None:
    from benchmarks.record import folder_name

    assert folder_name(device, cores) == folder


def test_failed_benchmarks_leave_the_results_of_before(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import record

    target = tmp_path / "device" / "cpu.json"
    target.parent.mkdir()
    target.write_text("before")
    monkeypatch.setattr(record, "_target", lambda options: target)
    monkeypatch.setattr(record, "ROOT", tmp_path)  # where there are no benchmarks
    monkeypatch.setattr(sys, "argv", ["record", "-q"])
    assert record.main() != 0
    assert target.read_text() == "before"
    assert list(target.parent.iterdir()) == [target]
    assert "was left as it is" in capsys.readouterr().out
