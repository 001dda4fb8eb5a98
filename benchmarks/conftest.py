"""Options, fixtures and the final table of the benchmarks."""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from .harness import measuring
from .harness.comparison import OURS, Prepared, Row, prepare
from .harness.rounds import Timing
from .harness.timing import Limits, Report, ratio_table, report_row, time_case

_REPORT = pytest.StashKey[Report]()

# The least ratios that CI demands, by group and peer.
_MINIMAL_RATIOS = Path(__file__).resolve().parents[1] / ".ci" / "minimal_ratios.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="also time the large cases (2048 x 4096), the slow peers and torch.compile",
    )
    parser.addoption(
        "--only-guarded",
        action="store_true",
        help="time only the cases and peers that .ci/minimal_ratios.json names",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_REPORT] = Report()
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError('The benchmarks need pytest-benchmark: pip install ".[bench]"')
    if config.getoption("benchmark_columns", None) is None:
        config.option.benchmark_columns = ["median", "iqr", "min", "rounds", "iterations"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = items
    if not config.getoption("--full"):
        kept = [item for item in kept if not item.get_closest_marker("full")]
    if config.getoption("--only-guarded"):
        kept = _guarded(kept, json.loads(_MINIMAL_RATIOS.read_text()))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _guarded(items: list[pytest.Item], minimal: dict[str, dict[str, float]]) -> list[pytest.Item]:
    """Selects our row and the named peers' rows of each group in `minimal`; fails if one of them was not collected."""
    wanted = {(group, name) for group, peers in minimal.items() for name in (OURS, *peers)}
    found = {(row.group, row.contender): item for item in items if (row := _row(item)) is not None}
    missing = sorted(wanted - found.keys())
    if missing:
        names = ", ".join(f"{name!r} in {group!r}" for group, name in missing)
        raise pytest.UsageError(
            f"{_MINIMAL_RATIOS.name} names benchmarks that were not collected: {names}. Correct the names, and pass "
            "all of benchmarks/ to pytest."
        )
    return [item for key, item in found.items() if key in wanted]


def _row(item: pytest.Item) -> Row | None:
    row = item.callspec.params.get("row") if hasattr(item, "callspec") else None
    return row if isinstance(row, Row) else None


@pytest.fixture(scope="session")
def limits() -> Limits:
    """The rates of the devices, each measured once per run."""
    return Limits(functools.cache(measuring.copy_bandwidth), functools.cache(measuring.matmul_rate))


@pytest.fixture(scope="session")
def prepared(pytestconfig: pytest.Config) -> Callable[[Row], Prepared]:
    """Prepares the inputs and verdicts of a row. The last case is cached, since the rows of a case are consecutive."""
    kept = functools.lru_cache(maxsize=1)(prepare)
    full = bool(pytestconfig.getoption("--full"))
    return lambda row: kept(row.comparison, row.case, row.device, full)


@pytest.fixture(scope="session")
def timings(
    request: pytest.FixtureRequest, prepared: Callable[[Row], Prepared]
) -> Callable[[Row], dict[str, Timing]]:
    """Times the selected rows of a row's case together, at the first of them; the last case is cached."""
    config = request.config

    @functools.lru_cache(maxsize=1)
    def time_group(group: str) -> dict[str, Timing]:
        selected = [row for item in request.session.items if (row := _row(item)) and row.group == group]
        inputs = prepared(selected[0])
        rows = [
            row
            for row in selected
            if row.peer is None or inputs.verdicts.get(row.peer.name, "was not compared") is None
        ]
        max_seconds, min_rounds = (
            config.getoption(f"benchmark_{name}") for name in ("max_time", "min_rounds")
        )
        return time_case(rows, inputs, float(max_seconds), int(min_rounds))

    return lambda row: time_group(row.group)


@pytest.fixture
def time_row(
    benchmark: Any,
    prepared: Callable[[Row], Prepared],
    timings: Callable[[Row], dict[str, Timing]],
    limits: Limits,
    pytestconfig: pytest.Config,
) -> Callable[[Row], None]:
    """Checks a row against its peers, then reports its times: `time_row(row)`."""

    def time_one(row: Row) -> None:
        problem = row.case.problem(row.device)
        if problem is None and row.peer is not None:
            problem = row.peer.problem(row.device)
        if problem is not None:
            pytest.skip(problem)
        inputs = prepared(row)
        if row.peer is not None:
            verdicts = [inputs.verdicts[row.peer.name]]
        else:
            verdicts = list(inputs.verdicts.values()) or ["no peer that runs here can check the result"]
        differences = [verdict for verdict in verdicts if verdict is not None]
        if differences:
            pytest.fail("\n".join(differences), pytrace=False)
        benchmark.name = row.contender
        benchmark.params = {"case": row.case.name, "device": row.device.type, "contender": row.contender}
        if not benchmark.enabled:
            benchmark.pedantic(row.call, args=inputs.arguments)
            return
        result = report_row(benchmark, row, inputs, timings(row)[row.contender], limits)
        pytestconfig.stash[_REPORT].add(row, result)

    return time_one


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    from panfpn_fast import _load

    build = {name: text for name, text in _load.build_report().items() if name != "installed in"}
    machine_info["panfpn_fast"] = build
    # Results are published, so the name of the host is removed.
    machine_info.pop("node", None)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Ignores changed results when it decides whether the working tree is dirty, since they do not affect timings."""
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        changes = subprocess.run(command, cwd=config.rootpath, check=True, capture_output=True)
        commit_info["dirty"] = bool(changes.stdout)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Adds the command and the versions, which the report shows, and removes the time of each single round."""
    arguments = list(map(str, config.invocation_params.args))
    # The path of the results is not a relevant part of the command.
    for number, text in enumerate(arguments):
        if text.startswith("--benchmark-json"):
            del arguments[number : number + (1 if "=" in text else 2)]
            break
    output_json["command"] = shlex.join(["pytest", *arguments])
    output_json["versions"] = {}
    for name in ("torch", "torchvision", "pycocotools", "triton", "detectron2"):
        with contextlib.suppress(PackageNotFoundError):
            output_json["versions"][name] = version(name)
    if not config.getoption("benchmark_save_data"):
        for row in output_json["benchmarks"]:
            row["stats"].pop("data", None)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = ratio_table(config.stash[_REPORT])
    if lines:
        terminalreporter.section("ours compared with the peers")
        for line in lines:
            terminalreporter.write_line(line)
