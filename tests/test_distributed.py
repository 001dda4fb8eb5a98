"""The environment variables of torchrun: complete, incomplete and invalid."""

from __future__ import annotations

import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from panfpn_fast._device import resolve_device
from panfpn_fast._errors import UserError
from panfpn_fast.distributed import PATIENCE, gather, launched_rank, process_group
from support.processes import environment, run
from support.ranks import run_ranks

COMPLETE = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMPLETE:
        monkeypatch.delenv(name, raising=False)


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_complete_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, COMPLETE)
    assert launched_rank() == 3


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "3"},
        {"LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1"},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "host"},
        {**COMPLETE, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": ""},
    ],
)
def test_one_process(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    set_variables(monkeypatch, variables)
    assert launched_rank() is None
    with process_group("cpu") as process:
        assert (process.rank, process.world_size, process.device.type) == (0, 1, "cpu")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "got 2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Start"),
        ({**COMPLETE, "MASTER_ADDR": ""}, "got 4 without MASTER_ADDR. Start"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: expected a whole number at least 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected .*, got 'two'"),
        ({**COMPLETE, "RANK": "4"}, "RANK: expected a whole number from 0 to 3 .*, got '4'"),
        ({**COMPLETE, "LOCAL_RANK": "-1"}, "LOCAL_RANK: expected .*, got '-1'"),
        ({**COMPLETE, "MASTER_PORT": "70000"}, "MASTER_PORT: expected .* from 0 to 65535 .*, got '70000'"),
    ],
)
def test_errors(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    set_variables(monkeypatch, variables)
    with pytest.raises(UserError, match=message) as info, process_group("cpu"):
        pass
    assert len(str(info.value)) < 200


def test_an_unknown_device() -> None:
    with pytest.raises(UserError, match="device: expected a device of this machine"), process_group("tape"):
        pass


@pytest.mark.parametrize("number", ["2", 2])
def test_the_number_of_a_gpu(monkeypatch: pytest.MonkeyPatch, number: str | int) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)  # as on a machine that has it
    assert resolve_device(number) == torch.device("cuda:2")
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"got '2'; it has cpu.* (built without CUDA|no NVIDIA driver)"):
            resolve_device(number)


@pytest.mark.parametrize("wrong", [True, 1.5, [0]])
def test_what_is_no_device(wrong: object) -> None:
    with pytest.raises(
        TypeError, match=r"device: expected a string, a torch\.device, an integer or None, got"
    ):
        resolve_device(wrong)


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        set_variables(monkeypatch, {**COMPLETE, "WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": port})
        message = f"MASTER_ADDR, MASTER_PORT: cannot join the other processes at 127.0.0.1:{port} "
        with pytest.raises(UserError, match=message) as info, process_group("cpu"):
            pass
    assert len(str(info.value)) < 200
    assert "\n" not in str(info.value)


def test_processes_wait_for_slower_ones() -> None:
    def meet(rank: int, patience: timedelta) -> None:
        with process_group("cpu", patience):
            time.sleep(2 * rank)
            assert gather(rank) == ([0, 1] if rank == 0 else [])

    run_ranks(2, lambda rank: meet(rank, PATIENCE))
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        run_ranks(2, lambda rank: meet(rank, timedelta(seconds=1)))


def test_commands_report_it_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "panfpn_fast.cli", "train", "--out", tmp_path / "out"]
    done = run(command, env=environment(WORLD_SIZE="2"), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("panfpn-fast: WORLD_SIZE: expected the environment of torchrun")
    assert len(done.stderr.splitlines()) == 1
