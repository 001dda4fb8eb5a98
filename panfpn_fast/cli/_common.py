"""Options, exit codes and messages that the commands share."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from panfpn_fast._errors import UserError, one_line

MOST_PIXELS = 65_536
"""Upper limit for the edges of resized images; larger numbers are mistakes, which would exhaust the memory."""

EXIT_OK, EXIT_SOME_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Parses options and positional arguments in any order; argparse's own parser wants positionals side by side."""

    _mixing = False

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses the arguments of a command; returns them and those that are not known."""
        # `parse_known_intermixed_args` calls this method for each of its two passes, and refuses commands of commands.
        if self._mixing or any(action.nargs == argparse.PARSER for action in self._actions):
            return super().parse_known_args(args, namespace)
        self._mixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False


def report(message: str) -> None:
    """Prints an error to stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"panfpn-fast: {message}", file=sys.stderr)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt inside the `with` block, so that files and processes are cleaned up.

    Does nothing under torchrun, where a process may wait in a collective operation that Python cannot interrupt, and if
    SIGTERM is ignored.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    if not main or before != signal.SIG_DFL or "WORLD_SIZE" in os.environ:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _last_line(error: BaseException) -> str:
    """Returns the line that states the error; a loader process sends its whole traceback before it."""
    if getattr(error, "filename", None) is not None:
        return one_line(error)
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


@contextmanager
def reporting_user_errors(less_memory: str) -> Iterator[None]:
    """Turns errors that the user can fix into a `UserError`: files, full disks and memory, killed loader processes.

    Args:
        less_memory: How the command needs less memory, for the message.
    """
    from panfpn_fast._device import is_out_of_memory
    from panfpn_fast.data.loader import is_worker_failure

    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except OSError as error:
        remedy = ""
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = f". {less_memory}, or raise the limit: ulimit -n 4096"
        raise UserError(_last_line(error) + remedy) from error
    except (RuntimeError, MemoryError) as error:
        if is_worker_failure(error):
            raise UserError(
                "a process that loads images was killed or failed; memory or file descriptors may have run out. "
                f"{less_memory} ({one_line(error)[:60]})"
            ) from error
        if is_out_of_memory(error):
            raise UserError(f"out of memory. {less_memory} ({_last_line(error)[:80]})") from error
        raise


def positive(text: str) -> int:
    """Parses a positive integer; an argparse type."""
    return _whole(text, 1, "a positive whole number")


def pixels(text: str) -> int:
    """Parses the length of an edge; an argparse type."""
    return _whole(text, 1, f"1 to {MOST_PIXELS} pixels", MOST_PIXELS)


def not_negative(text: str) -> int:
    """Parses an integer of at least 0; an argparse type."""
    return _whole(text, 0, "a whole number from 0 to below 2**63")


def _whole(text: str, least: int, expected: str, most: int = 2**63 - 1) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return number


def fraction(text: str) -> float:
    """Parses a number from 0 to 1; an argparse type."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0.0 <= number <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return number


def path(text: str) -> Path:
    """Parses the path of a file or folder on this machine; an argparse type."""
    return Path(path_or_key(text))


def path_or_key(text: str) -> str:
    """Parses a path on this machine, or the name of a part of a data set; an argparse type."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got nothing")
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"expected a path on this machine, got the address {text!r}; download it first"
        )
    return text


def name_or_path(text: str) -> str:
    """Parses the name or the path of a checkpoint; an argparse type."""
    if not text:
        raise argparse.ArgumentTypeError("expected the path of a checkpoint or a name, got nothing")
    return text


def check_not_input(option: str, out: Path, args: argparse.Namespace, names: Sequence[str]) -> None:
    """Checks that a result is not written over what the command reads.

    Args:
        option: What `out` is, for messages.
        out: The file or folder of the result.
        args: Values of the command's options.
        names: Those that are inputs; None is no input.

    Raises:
        UserError: If `out` is one of them.
    """
    for name in names:
        given = getattr(args, name)
        if given is not None and _is_same(out, Path(given)):
            where = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option}: expected another path than {where}, which the command reads, got {out}"
            )


def _is_same(first: Path, second: Path) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:  # one of them is missing
        return first.resolve() == second.resolve()


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds `--device`."""
    parser.add_argument(
        "--device",
        help="such as cpu, cuda:0 or 0 for that GPU (default: a CUDA GPU if there is one, else cpu)",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds `--dtype`."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype that the network computes in (default: %(default)s)",
    )


def add_workers(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds `--workers`; `default` describes the number without the option."""
    parser.add_argument(
        "--workers",
        type=not_negative,
        metavar="N",
        help=f"processes that load images; 0 loads without processes (default: {default})",
    )


def add_categories(parser: argparse.ArgumentParser) -> None:
    """Adds `--categories`."""
    parser.add_argument(
        "--categories",
        type=path,
        metavar="FILE",
        help="JSON with the classes of the network: a list of COCO's categories, or annotations of the training data",
    )


def categories_override(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the argument of `panfpn_fast.load` that `--categories` stands for."""
    from panfpn_fast.data import read_categories

    return {} if args.categories is None else {"categories": read_categories(args.categories)}


def add_semantic_weights(parser: argparse.ArgumentParser) -> None:
    """Adds `--semantic-weights`."""
    parser.add_argument(
        "--semantic-weights",
        type=name_or_path,
        metavar="NAME_OR_PATH",
        help="checkpoint of a second network that labels the stuff; the first network then finds only the things",
    )
