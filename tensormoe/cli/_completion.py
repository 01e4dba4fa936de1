"""``tensormoe completion``: the script that completes commands, options and names in a shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from tensormoe.cli._commands import COMMANDS, Commands, Parser

SHELLS = ("bash", "zsh", "fish")

_FILES = ("FILE", "MODEL", "SOURCE")
_FOLDERS = ("DIR",)


def add_parser(commands: Commands) -> None:
    """The options of the command."""
    parser = commands.add_parser(
        "completion",
        description="The script that completes commands, options, names and files in a shell.",
        epilog='examples: eval "$(tensormoe completion bash)"; tensormoe completion fish > '
        "~/.config/fish/completions/tensormoe.fish",
    )
    parser.add_argument("shell", metavar="SHELL", help="bash, zsh or fish")


def run(arguments: argparse.Namespace) -> None:
    """Print the script."""
    from tensormoe._extras import require
    from tensormoe._validation import choice
    from tensormoe.errors import SpecError

    shell = choice(arguments.shell, SHELLS, "SHELL", SpecError)
    require("tensormoe completion", ("shtab",), "cli")
    sys.stdout.write(completion(shell))


def completion(shell: str) -> str:
    """The script for a shell.

    Args:
        shell: one of ``SHELLS``.
    """
    import shtab

    from tensormoe.cli._commands import make_parser

    parser, known = make_parser(COMMANDS)
    for action in parser._actions:
        # the list of commands is a part of the description, and suppressed as an argument
        action.help = "COMMAND" if action.dest == "command" else action.help
    for each in known.values():
        _offer_words(each)
    text: str = shtab.complete(parser, shell=shell)
    return text if text.endswith("\n") else f"{text}\n"


def _offer_words(parser: Parser) -> None:
    """Let options offer names, files and folders."""
    import shtab

    words = _words()
    for action in parser._actions:
        option = action.option_strings[0] if action.option_strings else action.dest
        if option in words:
            action.choices = [*words[option]]
        elif action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]


def _words() -> dict[str, Iterable[str]]:
    """Names by the option, or the argument, that takes them."""
    from tensormoe.choosing._request import ITEMSIZES, KINDS
    from tensormoe.cli._options import FORMATS
    from tensormoe.cli._profile import DEVICES
    from tensormoe.cli.calibration import LIBRARIES
    from tensormoe.compression._gate_up import GATE_UP
    from tensormoe.compression._patterns import AUTO, PRESETS
    from tensormoe.factorizations import FACTORIZATIONS
    from tensormoe.gates._gate import ACTIVATIONS
    from tensormoe.selection import OBJECTIVES

    return {
        "--backend": LIBRARIES,
        "--budget": ("linear", "mlp"),
        "--device": DEVICES,
        "--dtype": ITEMSIZES,
        "--factorization": FACTORIZATIONS,
        "--format": FORMATS,
        "--gate": ("none", *ACTIVATIONS),
        "--gate-up": GATE_UP,
        "--kind": KINDS,
        "--layout": ("auto", "out_in", "in_out"),
        "--objective": OBJECTIVES,
        "--preset": (AUTO, *PRESETS),
        "names": COMMANDS,
        "shell": SHELLS,
    }
