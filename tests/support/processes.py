"""Starts other programs for tests, with a time limit and in a working directory outside the checkout.

In the checkout, `python -c` and `python -m` would import the source tree, which has no binaries, instead of the
installed package. No other module of the tests starts programs; ruff checks this (TID251). `ranks` forks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent

# Several times the duration of the slowest process, and below the time limit of a test in pyproject.toml.
SECONDS = 300


class Finished(NamedTuple):
    """The exit status and the output of a process."""

    returncode: int
    stdout: str
    stderr: str


def environment(**changes: str | None) -> dict[str, str]:
    """Returns this process's environment, for a Python process that imports the same packages.

    Args:
        **changes: Variables to set, or to remove where the value is None.
    """
    # The tests import their helpers from tests/, and the package from the checkout if its binaries are there.
    shared = [entry for entry in sys.path if Path(entry or ".").resolve() in (ROOT, TESTS)]
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*shared, inherited] if inherited else shared)
    changed = {**os.environ, "PYTHONPATH": path, **changes}
    return {name: value for name, value in changed.items() if value is not None}


class Running:
    """A process that `start` has started."""

    def __init__(self, process: subprocess.Popen[bytes], logs: Path, seconds: float) -> None:
        self.pid = process.pid
        self._process = process
        self._logs = logs
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition holds; fails the test if the process ends or reaches its time limit first."""
        while not condition():
            if self._process.poll() is not None:
                pytest.fail(f"the process ended too early, with {self._process.returncode}")
            if time.monotonic() > self._deadline:
                self._fail_at_limit()
            time.sleep(0.001)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process."""
        self._process.send_signal(number)

    def send_to_group(self, number: signal.Signals) -> None:
        """Sends a signal to the process and its children, as a terminal does."""
        os.killpg(self.pid, number)

    def finish(self) -> Finished:
        """Waits until the process ends; fails the test if it reaches its time limit first."""
        try:
            returncode = self._process.wait(max(self._deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            self._fail_at_limit()
        return Finished(returncode, self.output("stdout"), self.output("stderr"))

    def output(self, name: str) -> str:
        """Returns the output of the process so far; `name` is `stdout` or `stderr`."""
        return (self._logs / name).read_text(errors="replace")

    def _fail_at_limit(self) -> NoReturn:
        pytest.fail(f"the process did not end within {self._seconds} s")

    def kill(self) -> None:
        """Kills the process, all its descendants, and the rest of its process group."""
        for pid in (self.pid, *_descendants(self.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def _descendants(ancestor: int) -> list[int]:
    """Returns all descendants, also in other process groups: torchrun starts a session for each of its processes."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = stat.read_text().rpartition(")")[2].split()[1]  # after the name, see proc_pid_stat(5)
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [ancestor]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


@contextlib.contextmanager
def start(
    command: Sequence[object],
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    seconds: float = SECONDS,
) -> Iterator[Running]:
    """Starts a process in a process group of its own; kills it and its descendants at the end of the `with` block.

    An error in the block prints the process's output, which pytest shows with the error.

    Args:
        command: The program and its arguments, strings or paths.
        cwd: Working directory; by default a new one that is deleted afterwards.
        env: The whole environment; by default `environment()`.
        seconds: Time limit, from the start.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder, "logs")
        logs.mkdir()
        Path(folder, "cwd").mkdir()
        # Output goes to files, because a pipe stays open as long as any descendant lives.
        with open(logs / "stdout", "wb") as stdout, open(logs / "stderr", "wb") as stderr:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=cwd or Path(folder, "cwd"),
                env=environment() if env is None else env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        running = Running(process, logs, seconds)
        try:
            yield running
        except BaseException:
            print(f"output of {' '.join(map(str, command))}")
            print(running.output("stdout"), running.output("stderr"), sep="\n")
            raise
        finally:
            running.kill()


def run(
    command: Sequence[object],
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    seconds: float = SECONDS,
    check: bool = True,
) -> Finished:
    """Runs a process to its end.

    Args:
        command: The program and its arguments, strings or paths.
        cwd: Working directory; by default a new one that is deleted afterwards.
        env: The whole environment; by default `environment()`.
        seconds: Time limit.
        check: Whether the test fails if the exit status is not 0.
    """
    with start(command, cwd=cwd, env=env, seconds=seconds) as process:
        done = process.finish()
        if check and done.returncode != 0:
            pytest.fail(f"the process ended with {done.returncode}")
    return done
