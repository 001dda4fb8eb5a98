"""Images on their way from a loader process: equal, in one block of memory, without lasting file descriptors."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from panfpn_fast._errors import UserError
from panfpn_fast.data.loader import Unreadable, is_worker_failure, start_workers
from panfpn_fast.data.transfer import Packed, SenderGoneError, pack_in_worker
from support.processes import environment, run

VALUE = {
    "image": torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4),
    "turned": torch.rand(3, 5).t(),
    "empty": [torch.zeros(0, 4), torch.zeros(2, 0, dtype=torch.int64)],
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "flags": torch.tensor([True, False, True]),
    "text": ("a", None, Unreadable("b")),
}


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        found.zero_()  # it can be written to
    elif isinstance(expected, dict):
        for name, value in expected.items():
            assert_equal(found[name], value)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


def no_memfd(name: str) -> int:
    raise OSError(24, "Too many open files")


@pytest.mark.parametrize("shared", [True, False])
def test_the_object_arrives_as_it_was(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    if not shared:
        monkeypatch.setattr(os, "memfd_create", no_memfd)
    sent = pickle.dumps(Packed(VALUE))
    assert_equal(pickle.loads(sent), VALUE)
    assert len(os.listdir("/proc/self/fd")) <= before + 3  # the server of descriptors, which stays


def test_nothing_in_the_object_is_a_tensor() -> None:
    assert pickle.loads(pickle.dumps(Packed([1, "a"]))) == [1, "a"]


class _Numbers(torch.utils.data.Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        return torch.full((1000,), index)


def test_batches_stay_valid_after_their_worker_has_ended() -> None:
    loader = DataLoader(_Numbers(), sampler=range(9), batch_size=3, num_workers=2, collate_fn=pack_in_worker)
    batches = list(start_workers(loader))
    assert [[int(one[7]) for one in batch] for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert not any(one.is_shared() for batch in batches for one in batch)  # none is in /dev/shm


_FEW_DESCRIPTORS = """
import resource
from itertools import islice
from panfpn_fast.data import SyntheticDataset, TrainLoader
from panfpn_fast.data.transforms import Compose

resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
loader = TrainLoader(SyntheticDataset(64), Compose([]), 16, workers=2)
kept = list(islice(loader, 6))
print(sum(len(batch.images) for batch in kept))
"""


def test_few_file_descriptors_are_enough() -> None:
    """Six batches of 16 images and their targets are 480 tensors."""
    done = run([sys.executable, "-c", _FEW_DESCRIPTORS], env=environment(OMP_NUM_THREADS="1"))
    assert done.stdout == "96\n"


@pytest.mark.parametrize("limit", [8, 14])
def test_too_few_file_descriptors_end_the_command(limit: int, tmp_path: Path) -> None:
    """Too few for the first worker process, or for the second, when the first one must be ended."""
    script = (
        "import resource, sys, torch, torch.utils.data, panfpn_fast, panfpn_fast.training.setup\n"
        "import panfpn_fast.cli.train, panfpn_fast.training.settings\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))\n"
        "from panfpn_fast.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = [
        "train",
        "--preset",
        "tiny",
        "--out",
        tmp_path,
        "--device",
        "cpu",
        "workers=2",
        "solver.steps=1",
    ]
    arguments += ["data.synthetic_val_count=0", "data.short_edges=[64]", "solver.batch_size=1"]
    environ = environment(OMP_NUM_THREADS="1")
    done = run([sys.executable, "-c", script, *arguments], env=environ, check=False)
    assert done.returncode == 2
    # Python and torch print errors of cleaning up, which they ignore.
    [said] = [line for line in done.stderr.splitlines() if line.startswith("panfpn-fast: ")]
    assert "workers: cannot start 2 processes that load images (Too many open files)" in said


def test_processes_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(self: DataLoader[Any]) -> None:
        raise OSError(38, "Function not implemented")  # as without /dev/shm

    loader = DataLoader(_Numbers(), sampler=range(9), num_workers=2)
    monkeypatch.setattr(DataLoader, "__iter__", no_locks)
    message = r"workers: cannot start 2 processes .* \(Function not implemented\); set workers to 0"
    with pytest.raises(UserError, match=message):
        start_workers(loader)


def test_a_sender_that_has_ended_is_a_worker_failure(tmp_path: Path) -> None:
    script = (
        "import pathlib, pickle, sys, torch\n"
        "from panfpn_fast.data.transfer import Packed\n"
        "pathlib.Path(sys.argv[1]).write_bytes(pickle.dumps(Packed(torch.zeros(8))))"
    )
    run([sys.executable, "-c", script, tmp_path / "sent"])
    with pytest.raises(SenderGoneError, match="the process that sends images has ended") as caught:
        pickle.loads((tmp_path / "sent").read_bytes())
    assert is_worker_failure(caught.value)
