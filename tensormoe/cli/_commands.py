"""The commands, and the parser of those that are asked for: each is imported when it runs."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from tensormoe.errors import SpecError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are the library's."""

    def error(self, message: str) -> NoReturn:
        raise SpecError(f"{message}. Run: {self.prog} --help")


class Commands(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Parsers of commands, each with its summary: what ``add_parser`` of a module adds one to."""

    def add_parser(self, name: str, **options: Any) -> Parser:
        """The parser of a command, to add its options to."""
        parser: Parser = super().add_parser(name, **{"help": COMMANDS[name].summary, **options})
        return parser


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        module: has ``add_parser(commands)`` and ``run(arguments)``.
        summary: for the list of commands.
    """

    module: str
    summary: str

    def load(self) -> ModuleType:
        """The module, which imports nothing heavy until it runs."""
        return import_module(f"tensormoe.cli.{self.module}")


COMMANDS: Mapping[str, Command] = {
    "rank": Command(
        "_rank",
        "what a budget buys: ranks of every factorization, next to the layers that they replace",
    ),
    "plan": Command(
        "_plan",
        "how a layer runs: its tensor network, and the steps of its contraction with their cost",
    ),
    "choose": Command("_choose", "the same as a page in the browser: tables, plots and code"),
    "calibrate": Command("_calibrate", "measure this machine, for predicted times"),
    "demo": Command("_demo", "factorized experts on real images, from budget to picture"),
    "compress": Command("_compress", "the experts of a model's checkpoint, decomposed"),
    "calibrate-model": Command(
        "_calibrate_model", "what a model's experts get and give on a text, for compress"
    ),
    "evaluate": Command("_evaluate", "what a compression does to what a model predicts"),
    "heal": Command("_heal", "a compressed model trained to predict what the original predicts"),
    "reduce": Command("_reduce", "the experts of a model on disk, merged or pruned to fewer"),
    "allocate": Command("_allocate", "one budget for all layers of a model: a rank for each"),
    "explore": Command("_explore", "a page that shows what every expert of a layer does"),
    "config": Command("_config", "defaults that are in force, and where each comes from"),
    "completion": Command("_completion", "the script that completes words in bash, zsh or fish"),
}

_NAME_WIDTH = max(map(len, COMMANDS)) + 2


def make_parser(asked: Collection[str]) -> tuple[Parser, Mapping[str, Parser]]:
    """The parser of the command line, and those of the commands that are asked for.

    Args:
        asked: names of commands; the others are known by name alone.
    """
    from tensormoe import __version__

    parser = Parser(
        prog="tensormoe",
        usage="tensormoe [-h] [--version] COMMAND ...",
        description=_description(),
        epilog="A command's own options: tensormoe COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tensormoe {__version__}")
    commands = parser.add_subparsers(
        action=Commands,
        dest="command",
        metavar="COMMAND",
        required=True,
        help=argparse.SUPPRESS,
        prog="tensormoe",
    )
    for name, command in COMMANDS.items():
        if name in asked:
            command.load().add_parser(commands)
            commands.choices[name].add_argument(
                "--config", metavar="FILE", help="read defaults from FILE and nowhere else"
            )
        else:
            commands.add_parser(name, add_help=False)
    return parser, {name: commands.choices[name] for name in COMMANDS if name in asked}


def _description() -> str:
    lines = ["Factorized mixtures of linear experts: choose, plan and try them out.", ""]
    lines.append("commands:")
    for name, command in COMMANDS.items():
        lines += textwrap.wrap(
            command.summary,
            width=74,
            initial_indent=f"  {name:<{_NAME_WIDTH}}",
            subsequent_indent=" " * (_NAME_WIDTH + 2),
        )
    return "\n".join(lines)
