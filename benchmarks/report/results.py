"""Reads the JSON that pytest-benchmark writes into runs, groups and rows, and chooses what is shown where."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

# The README's table: an op, and the case to show of it. Where a run lacks the case, its first case stands in.
_HIGHLIGHTS = (
    ("multiscale_roi_align", "1000 x 7 x 7, channels-last"),
    ("roi_align, forward and backward", "1000 x 7 x 7, NCHW"),
    ("nms", "4000 boxes"),
    ("batched_nms", "4000 x 80 classes"),
    ("paste_masks", "100 into 800 x 1333"),
    ("paste_masks_rle", "100 into 800 x 1333"),
    ("panoptic_merge", "100 in 800 x 1333"),
    ("upsample_argmax", "54 x 200 x 336, scene, channels-last"),
    ("upsample_cross_entropy, forward and backward", "54 x 200 x 336 to 800 x 1344, NCHW"),
    ("group_norm_relu_upsample", "128 x 100 x 168, channels-last, float32"),
    ("semantic head", "800 x 1344, float32"),
    ("semantic head, forward, loss and backward", "800 x 1344, float32"),
    ("shared network", "R-50, 480 x 640"),
    ("shared network, training step", "R-50, 480 x 640"),
    ("prediction", "R-50, 800 x 1333, batch 1, float32"),
    ("patched torchvision", "maskrcnn_resnet50_fpn_v2, 480 x 640, batch 1"),
    ("panoptic_quality", "20 segments, 1024 x 2048"),
)

_SHARED = "shared network"
_TWO = "two networks"
_OURS = "ours"


class ResultsError(ValueError):
    """A file is not the JSON of a benchmark run."""


@dataclass(frozen=True)
class Row:
    """One contender on one case: its median in seconds, and the `extra_info` of the benchmark."""

    contender: str
    median: float
    info: dict[str, Any]

    def figure(self, name: str) -> float | None:
        """A number of `extra_info`, of two networks the sum; None where it was not noted."""
        value = self.info.get(name)
        return sum(value) if isinstance(value, list) else value

    @property
    def stages(self) -> dict[str, float]:
        """Milliseconds of each stage of the network, where they were measured."""
        return self.info.get("stages_ms") or {}

    @property
    def is_ours(self) -> bool:
        """Whether this is ours, or ours in another layout or compiled."""
        return self.contender.partition(",")[0] == _OURS


@dataclass(frozen=True)
class Group:
    """The rows of a case: ours first, then its variants and peers as they were timed."""

    op: str
    case: str
    rows: tuple[Row, ...]

    @property
    def ours(self) -> Row:
        return self.rows[0]

    @property
    def peers(self) -> tuple[Row, ...]:
        """All that is not ours."""
        return tuple(row for row in self.rows if not row.is_ours)

    def ratio(self, peer: Row) -> float:
        """The peer's median over ours: above 1 ours is faster."""
        return peer.median / self.ours.median

    @property
    def fastest(self) -> Row:
        """The fastest of the peers; there must be one."""
        return min(self.peers, key=lambda peer: peer.median)

    @property
    def two(self) -> Row | None:
        """The two separate networks of the same backbone, where this is about one shared network."""
        return next((peer for peer in self.peers if self.is_shared and peer.contender == _TWO), None)

    @property
    def is_shared(self) -> bool:
        return self.op.startswith(_SHARED)

    @property
    def is_network(self) -> bool:
        """Whether whole networks or backbones are compared, not an op."""
        return self.is_shared or "parameters" in self.ours.info or bool(self.ours.stages)


@dataclass(frozen=True)
class Run:
    """The results of one run on one device.

    Attributes:
        source: The JSON file, relative to the repository where it lies there.
        name: Folder of the plots: the device's folder and the file's stem.
        device: What the device calls itself.
        details: Threads, versions, commit, date and command, in words.
        groups: In the order of the file; a case that ours was not timed on is left out.
    """

    source: str
    name: str
    device: str
    details: str
    groups: tuple[Group, ...]

    @property
    def provenance(self) -> str:
        """Where the figures come from: for the line below a table."""
        return f"{self.device}, {self.details}"

    @property
    def compared(self) -> list[Group]:
        """All groups in which there is a peer."""
        return [group for group in self.groups if group.peers]

    @property
    def ops(self) -> list[Group]:
        """Groups of single ops and heads."""
        return [group for group in self.groups if not group.is_network]

    @property
    def metered(self) -> list[Group]:
        """Groups of `ops` whose bytes and flops are known."""
        return [group for group in self.ops if "share_of_copy" in group.ours.info]

    @property
    def matmul(self) -> dict[str, float]:
        """GFLOP/s of the device's matrix product in each dtype that the groups of `metered` have."""
        rates = {
            group.ours.info["dtype"]: group.ours.info.get("matmul_gflop_per_s") for group in self.metered
        }
        return {dtype: rate for dtype, rate in rates.items() if rate is not None and dtype != "none"}

    @property
    def networks(self) -> list[Group]:
        """Groups of whole networks and backbones but for those of `shared`."""
        return [group for group in self.groups if group.is_network and not group.is_shared]

    @property
    def shared(self) -> list[Group]:
        """Groups that set one shared network beside two."""
        return [group for group in self.groups if group.is_shared]

    @property
    def staged(self) -> list[tuple[Group, Row]]:
        """Rows whose time is split into stages."""
        return [(group, row) for group in self.groups for row in group.rows if row.stages]

    @property
    def losses(self) -> list[tuple[Group, Row]]:
        """Groups and peers that are faster than ours."""
        return [(group, peer) for group in self.groups for peer in group.peers if group.ratio(peer) < 1]

    @property
    def highlights(self) -> list[Group]:
        """The groups of the README's table."""
        found = []
        for op, case in _HIGHLIGHTS:
            same = [group for group in self.compared if group.op == op]
            found += [group for group in same if group.case == case] or same[:1]
        return found


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
        A run for each device in it. Rows that the harness of these benchmarks did not write are left out.

    Raises:
        ResultsError: The file is not JSON, or lacks what pytest-benchmark writes; names the file.
        OSError: It cannot be read.
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
    """The results in the repository, a folder for each device."""
    return sorted(RESULTS.glob("*/*.json"))
