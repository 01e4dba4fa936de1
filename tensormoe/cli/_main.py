"""The way from words to a command, and what every error becomes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from tensormoe.cli._commands import COMMANDS, make_parser
from tensormoe.cli._console import print_error
from tensormoe.errors import RequestError, TensormoeError

__all__ = ["main"]

_FAILED, _INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after ``tensormoe``; those of the process by default.

    Returns:
        The exit status: 0, 2 for an error that was reported on standard error, 130 when
        interrupted, 1 when the reader of a pipe went away.
    """
    # names and rules beyond ASCII never stop a result from being shown
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            _run([*(sys.argv[1:] if argv is None else argv)])
            return 0
        finally:
            sys.stdout.flush()
    except RequestError as error:
        for each in error.fields.values():
            print_error(str(each))
        return _FAILED
    except TensormoeError as error:
        print_error(str(error))
        return _FAILED
    except KeyboardInterrupt as reason:
        print_error(f"interrupted: {reason}." if str(reason) else "interrupted.")
        return _INTERRUPTED
    except BrokenPipeError:
        # the interpreter flushes once more at exit: give it somewhere to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(words: list[str]) -> None:
    # before the command there are --help and --version alone
    asked = next((word for word in words if not word.startswith("-")), "")
    parser, known = make_parser((asked,))
    if asked not in known:
        parser.parse_args(words)
    from tensormoe.cli._settings import apply, forget_defaults, with_source

    defaults = forget_defaults(known[asked])
    given, unknown = parser.parse_known_args(words)
    if unknown:
        known[asked].error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments = apply(asked, known[asked], defaults, given)
    try:
        COMMANDS[asked].load().run(arguments)
    except RequestError:
        raise  # its errors name their options
    except TensormoeError as error:
        error.args = (with_source(str(error), arguments),)
        raise
