"""Options, fixtures and the closing table of the benchmarks."""

from __future__ import annotations

import contextlib
import functools
import shlex
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

from . import measuring
from .harness import Prepared, Row, prepare
from .timing import Limits, Report, measure, ratio_table

_REPORT = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="also time the large cases (2048 x 4096), the slow peers and torch.compile",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs an NVIDIA GPU and the CUDA ops")
    config.addinivalue_line("markers", "full: runs with --full only")
    config.stash[_REPORT] = Report()
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError('The benchmarks need pytest-benchmark: pip install ".[bench]"')
    if config.getoption("benchmark_columns", None) is None:
        config.option.benchmark_columns = ["median", "iqr", "min", "rounds", "iterations"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    dropped = [item for item in items if item.get_closest_marker("full")]
    items[:] = [item for item in items if not item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(scope="session")
def limits() -> Limits:
    """The devices' own rates, each measured once in the run."""
    return Limits(functools.cache(measuring.copy_bandwidth), functools.cache(measuring.matmul_rate))


@pytest.fixture(scope="session")
def prepared(pytestconfig: pytest.Config) -> Callable[[Row], Prepared]:
    """Inputs and verdicts; those of the last case are kept, because the rows of a case follow each other."""
    kept = functools.lru_cache(maxsize=1)(prepare)
    full = bool(pytestconfig.getoption("--full"))
    return lambda row: kept(row.comparison, row.case, row.device, full)


@pytest.fixture
def time_row(
    benchmark: Any,
    prepared: Callable[[Row], Prepared],
    limits: Limits,
    pytestconfig: pytest.Config,
) -> Callable[[Row], None]:
    """Checks a row against its peers, then times it: `time_row(row)`."""

    def time_one(row: Row) -> None:
        problem = row.peer.problem(row.device) if row.peer is not None else None
        if problem is not None:
            pytest.skip(problem)
        inputs = prepared(row)
        if row.peer is not None:
            verdicts = [inputs.verdicts[row.peer.name]]
        else:
            verdicts = list(inputs.verdicts.values()) or ["no peer runs here that could check the result"]
        differences = [verdict for verdict in verdicts if verdict is not None]
        if differences:
            pytest.fail("\n".join(differences), pytrace=False)
        result = measure(benchmark, row, inputs, limits, pytestconfig)
        if result is not None:
            pytestconfig.stash[_REPORT].add(row, result)

    return time_one


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    from panfpn_fast import _load

    build = {name: text for name, text in _load.build_report().items() if name != "installed in"}
    machine_info["panfpn_fast"] = build
    # Results are published: the name of the host is nobody's business.
    machine_info.pop("node", None)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Results that are being written anew are no change to what is measured."""
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        changes = subprocess.run(command, cwd=config.rootpath, check=True, capture_output=True)
        commit_info["dirty"] = bool(changes.stdout)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Notes what the report says of a run, command and versions, and leaves out the time of each single round."""
    arguments = list(map(str, config.invocation_params.args))
    # Where its results went is no part of the command.
    for number, text in enumerate(arguments):
        if text.startswith("--benchmark-json"):
            del arguments[number : number + (1 if "=" in text else 2)]
            break
    output_json["command"] = shlex.join(["pytest", *arguments])
    output_json["versions"] = {}
    for name in ("torch", "torchvision", "pycocotools", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            output_json["versions"][name] = version(name)
    if not config.getoption("benchmark_save_data"):
        for row in output_json["benchmarks"]:
            row["stats"].pop("data", None)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = ratio_table(config.stash[_REPORT])
    if lines:
        terminalreporter.section("ours against the peers")
        for line in lines:
            terminalreporter.write_line(line)
