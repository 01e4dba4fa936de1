"""``tensormoe choose``: what it takes."""

from __future__ import annotations

import argparse

from tensormoe.cli._commands import Commands


def add_parser(commands: Commands) -> None:
    """The options of the command."""
    parser = commands.add_parser(
        "choose",
        description="A page in the browser that answers what rank and plan answer, as fields and "
        "sliders move. It is served to this machine alone.",
    )
    option = parser.add_argument
    option("--port", default="8765", metavar="N", help="where (default: 8765; 0: any free one)")
    option("--no-browser", dest="browser", action="store_false", help="print the address alone")


def run(arguments: argparse.Namespace) -> None:
    """Serve until interrupted."""
    from tensormoe.cli._server import run_choose

    run_choose(arguments)
