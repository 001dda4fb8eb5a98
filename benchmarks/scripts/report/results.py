"""Converts the JSON of pytest-benchmark to runs, groups and rows, and selects the groups of each table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results"

_SHARED = "shared network"
_TWO = "two networks"
_OURS = "ours"
_DETECTRON2 = "detectron2 0.6"  # the installed package; its algorithms alone are named "detectron2"


class ResultsError(ValueError):
    """A file is not the JSON of a benchmark run."""


@dataclass(frozen=True)
class Row:
    """One contender on one case: its median in seconds and the `extra_info` of the benchmark."""

    contender: str
    median: float
    info: dict[str, Any]

    def figure(self, name: str) -> float | None:
        """Returns a number of `extra_info`, summed if there is one per network, or None if it was not recorded."""
        value = self.info.get(name)
        return sum(value) if isinstance(value, list) else value

    @property
    def stages(self) -> dict[str, float]:
        """Milliseconds of each stage of the network; empty if they were not measured."""
        return self.info.get("stages_ms") or {}

    @property
    def step(self) -> dict[str, float]:
        """Milliseconds of each part of a whole training step; empty if they were not measured."""
        return self.info.get("step_ms") or {}

    @property
    def is_ours(self) -> bool:
        """Whether this is our implementation, possibly in another layout or compiled."""
        return self.contender.partition(",")[0] == _OURS


@dataclass(frozen=True)
class Group:
    """The rows of a case: ours first, then its variants and the peers in the order in which they were timed."""

    op: str
    case: str
    rows: tuple[Row, ...]

    @property
    def ours(self) -> Row:
        return self.rows[0]

    @property
    def peers(self) -> tuple[Row, ...]:
        """The rows of other implementations."""
        return tuple(row for row in self.rows if not row.is_ours)

    def ratio(self, peer: Row, ours: Row | None = None) -> float:
        """Returns a peer's time divided by ours, or by a variant of ours; above 1 ours is faster.

        It is the median of the ratios of interleaved rounds. Results from before the rounds were interleaved have the
        ratio of the medians.
        """
        ours = ours or self.ours
        return ours.info.get("ratio_to", {}).get(peer.contender, peer.median / ours.median)

    def range(self, peer: Row) -> list[float] | None:
        """Returns the 20th and the 80th percentile of the rounds' ratios, or None if the rounds were separate."""
        return peer.info.get("times_ours_from_20_to_80_percent")

    @property
    def fastest(self) -> Row:
        """The fastest peer; the group must have one."""
        return min(self.peers, key=self.ratio)

    @property
    def featured(self) -> list[Row]:
        """The peers that README shows: the fastest one, and the installed detectron2 if it was timed."""
        return [peer for peer in self.peers if peer is self.fastest or peer.contender == _DETECTRON2]

    @property
    def two(self) -> Row | None:
        """The row of two separate networks with the same backbone, if the group compares a shared network."""
        return next((peer for peer in self.peers if self.is_shared and peer.contender == _TWO), None)

    @property
    def is_shared(self) -> bool:
        return self.op.startswith(_SHARED)

    @property
    def is_network(self) -> bool:
        """Whether the group compares whole networks or backbones instead of an op."""
        return self.is_shared or "parameters" in self.ours.info or bool(self.ours.stages)

    @property
    def is_loading(self) -> bool:
        """Whether the group compares loaders of training data."""
        return "workers" in self.ours.info


@dataclass(frozen=True)
class Run:
    """The results of one run on one device.

    Attributes:
        source: The JSON file, relative to the repository if it is inside.
        name: Directory of the plots: the device's directory and the file's stem.
        device: The model name of the device.
        details: Threads, versions, commit, date, command and the kind of the rounds, as text.
        groups: The groups in the order of the file, without cases on which ours was not timed.
    """

    source: str
    name: str
    device: str
    details: str
    groups: tuple[Group, ...]

    @property
    def provenance(self) -> str:
        """The origin of the figures, for the line below a table."""
        return f"{self.device}, {self.details}"

    @property
    def compared(self) -> list[Group]:
        """The groups that have a peer."""
        return [group for group in self.groups if group.peers]

    @property
    def ops(self) -> list[Group]:
        """The groups of single ops and heads."""
        return [group for group in self.groups if not group.is_network and not group.is_loading]

    @property
    def metered(self) -> list[Group]:
        """The groups of `ops` whose bytes and flops are known."""
        return [group for group in self.ops if "share_of_copy" in group.ours.info]

    @property
    def matmul(self) -> dict[str, float]:
        """GFLOP/s of the device's matrix product in each dtype of the groups in `metered`."""
        rates = {
            group.ours.info["dtype"]: group.ours.info.get("matmul_gflop_per_s") for group in self.metered
        }
        return {dtype: rate for dtype, rate in rates.items() if rate is not None and dtype != "none"}

    @property
    def networks(self) -> list[Group]:
        """The groups of whole networks and backbones that are not in `shared`."""
        return [group for group in self.groups if group.is_network and not group.is_shared]

    @property
    def shared(self) -> list[Group]:
        """The groups that compare one shared network with two."""
        return [group for group in self.groups if group.is_shared]

    @property
    def staged(self) -> list[tuple[Group, Row]]:
        """The rows whose time is split into stages."""
        return [(group, row) for group in self.groups for row in group.rows if row.stages]

    @property
    def steps(self) -> list[tuple[Group, Row]]:
        """The rows of training steps whose time is split into parts."""
        return [(group, row) for group in self.groups for row in group.rows if row.step]

    @property
    def loading(self) -> list[Group]:
        """The groups that compare loaders of training data."""
        return [group for group in self.groups if group.is_loading]

    @property
    def losses(self) -> list[tuple[Group, Row]]:
        """The peers that are faster than ours, with their groups."""
        return [(group, peer) for group in self.groups for peer in group.peers if group.ratio(peer) < 1]

    @property
    def highlights(self) -> list[Group]:
        """The groups that README shows: networks, then ops."""
        marked = [group for group in self.compared if group.ours.info.get("highlight")]
        return sorted(marked, key=lambda group: not group.is_network)


def _details(data: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    build = data["machine_info"].get("panfpn_fast", {})
    versions = {"torch": build.get("torch"), **data.get("versions", {})}
    threads = rows[0]["extra_info"].get("threads")
    commit = data["commit_info"]
    words = [f"{threads} thread{'' if threads == 1 else 's'}"] if threads is not None else []
    words += [f"{name} {versions[name]}" for name in ("torch", "torchvision") if versions.get(name)]
    if commit.get("id") not in (None, "unknown", "unversioned"):
        words.append(f"commit {commit['id'][:10]}{' with changes' if commit.get('dirty') else ''}")
    words.append(data["datetime"][:10])
    if data.get("command"):
        words.append(f"`{data['command']}`")
    if all(row["extra_info"].get("rounds") == "interleaved" for row in rows):
        words.append("interleaved rounds")
    else:
        words.append("separate rounds, so a ratio is that of two medians")
    return ", ".join(words)


def _groups(rows: Iterable[dict[str, Any]]) -> tuple[Group, ...]:
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        info = row["extra_info"]
        found = Row(info["contender"], row["stats"]["median"], info)
        cases.setdefault((info["op"], info["case"]), []).append(found)
    return tuple(
        Group(op, case, (ours, *(row for row in found if row is not ours)))
        for (op, case), found in cases.items()
        for ours in [row for row in found if row.contender == _OURS][:1]
    )


def read_runs(path: Path) -> list[Run]:
    """Reads a JSON file of pytest-benchmark.

    Args:
        path: The file.

    Returns:
        A run for each device in the file. Rows that these benchmarks did not write are ignored.

    Raises:
        ResultsError: If the file is not JSON or lacks a field that pytest-benchmark writes.
        OSError: If the file cannot be read.
    """
    path = path.resolve()
    source = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    devices: dict[str, list[dict[str, Any]]] = {}
    try:
        data = json.loads(path.read_text())
        for row in data["benchmarks"]:
            if "op" in row["extra_info"]:
                devices.setdefault(row["extra_info"]["device"], []).append(row)
        name = f"{path.parent.name}/{path.stem}"
        return [
            Run(
                source,
                name if number == 1 else f"{name}-{number}",
                device,
                _details(data, rows),
                _groups(rows),
            )
            for number, (device, rows) in enumerate(devices.items(), 1)
        ]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{source} is not the JSON of a benchmark run: {error!r}") from error


def committed() -> list[Path]:
    """Lists the results in the repository; each device has a directory."""
    return sorted(RESULTS.glob("*/*.json"))
