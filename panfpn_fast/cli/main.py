"""`panfpn-fast`: assembles the commands, runs one, and turns errors into messages and exit codes.

torch is imported only by the command that needs it, so that `--help` and usage errors are immediate.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence

from panfpn_fast._errors import UserError, one_line
from panfpn_fast._version import version
from panfpn_fast.cli._common import (
    EXIT_INTERRUPTED,
    EXIT_SOME_FAILED,
    EXIT_USAGE,
    Parser,
    report,
    sigterm_interrupts,
)
from panfpn_fast.cli.bench import add_bench
from panfpn_fast.cli.convert import add_convert
from panfpn_fast.cli.data import add_data
from panfpn_fast.cli.demo import add_demo
from panfpn_fast.cli.evaluate import add_eval
from panfpn_fast.cli.export import add_export
from panfpn_fast.cli.info import add_info
from panfpn_fast.cli.predict import add_predict
from panfpn_fast.cli.train import add_train


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status; argparse itself exits on `--help` and usage errors."""
    for stream in (sys.stdout, sys.stderr):
        # File names need not be valid text, and printing one must not end the run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    try:
        command: Callable[[argparse.Namespace], int] = args.run
        with sigterm_interrupts():
            code = command(args)
        if sys.stdout is not None:  # it is None if the standard output was closed
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output has exited, as `| head` does
        _drop_output()
        return EXIT_SOME_FAILED
    except UserError as error:
        report(one_line(error))
        return EXIT_USAGE
    except OSError as error:  # the commands turn errors of their files into UserErrors, so this is the output
        _drop_output()
        report(f"cannot write the output: {one_line(error)}")
        return EXIT_USAGE
    except KeyboardInterrupt:
        report("interrupted")
        return EXIT_INTERRUPTED


def _drop_output() -> None:
    """Makes Python's last flush succeed."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="panfpn-fast",
        description="Panoptic segmentation with Panoptic FPN: things and stuff in one image.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for add in (
        add_predict,
        add_train,
        add_eval,
        add_data,
        add_demo,
        add_convert,
        add_export,
        add_bench,
        add_info,
    ):
        add(commands)
    return parser
