"""``tensormoe config``: the defaults that are in force, and where each comes from."""

from __future__ import annotations

import argparse
import sys

from tensormoe.cli._commands import COMMANDS, Commands
from tensormoe.cli._options import add_format


def add_parser(commands: Commands) -> None:
    """The options of the command."""
    parser = commands.add_parser(
        "config",
        description="The defaults of options that are in force, and where each comes from: "
        "[tool.tensormoe] in ./pyproject.toml, tensormoe.toml in the user's config folder, or the "
        "command itself. Options hold for all commands, those in a table with a command's name "
        "for that command.",
        epilog="example of a file: batch = 4096, and below it [rank] with objective = "
        '"expert_rank"',
    )
    parser.add_argument(
        "names", metavar="COMMAND", nargs="*", help="only these commands (default: all)"
    )
    add_format(parser)


def run(arguments: argparse.Namespace) -> None:
    """Show the defaults."""
    from tensormoe._validation import choice
    from tensormoe.cli._asked import parse_format
    from tensormoe.cli._columns import Column, csv_text, markdown_text
    from tensormoe.cli._commands import make_parser
    from tensormoe.cli._console import make_console, make_table, print_json
    from tensormoe.cli._settings import (
        DEFAULT,
        Setting,
        forget_defaults,
        from_files,
        settings_files,
    )
    from tensormoe.errors import SpecError

    form = parse_format(arguments)
    asked = arguments.names or [*COMMANDS]
    for name in asked:
        choice(name, COMMANDS, "COMMAND", SpecError)
    files = settings_files(arguments.config)
    rows = []
    for name, parser in make_parser(asked)[1].items():
        values = {
            option: Setting(value, DEFAULT) for option, value in forget_defaults(parser).items()
        } | from_files(name, parser, arguments.config)
        rows += [
            {
                "command": name,
                "option": option.replace("_", "-"),
                "value": setting.value,
                "source": setting.source,
            }
            for option, setting in values.items()
            if setting.value not in (None, []) and option not in ("config", "json")
        ]
    columns = tuple(Column(key, key) for key in ("command", "option", "value", "source"))
    if form == "json":
        listed = [{"path": str(each.path), "found": each.table is not None} for each in files]
        print_json({"command": "config", "files": listed, "settings": rows})
        return
    shown = [{**row, "value": _shown(row["value"])} for row in rows]
    if form == "csv":
        sys.stdout.write(csv_text(columns, shown))
        return
    cells = [[column.cell(row) for column in columns] for row in shown]
    heads = [column.head for column in columns]
    if form == "markdown":
        sys.stdout.write(markdown_text(heads, cells, left=len(heads)))
        return
    console = make_console()
    console.print()
    for file in files:
        state = "" if file.table is not None else ": nothing for tensormoe"
        console.print(f"{file.path}{state}", soft_wrap=True)
    console.print()
    table = make_table(*heads, left=len(heads))
    for line in cells:
        table.add_row(*line, style="" if line[-1] == DEFAULT else "bold")
    console.print(table)
    console.print()


def _shown(value: object) -> str:
    """A value as a file of settings would have it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, list) else str(value)
