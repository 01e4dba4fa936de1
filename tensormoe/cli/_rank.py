"""``tensormoe rank``: what a budget buys, next to the layers that it replaces."""

from __future__ import annotations

import argparse
import sys

from tensormoe.cli._commands import Commands
from tensormoe.cli._options import add_layer, add_switch


def add_parser(commands: Commands) -> None:
    """The options of the command."""
    parser = commands.add_parser(
        "rank",
        description="The rank with the most capacity that a budget allows, for every "
        "factorization, with its cost next to that of the layers it replaces.",
        epilog="example: tensormoe rank 768 768 512 --budget linear --plot front.png",
    )
    add_layer(parser, "counted in every figure")
    option = parser.add_argument
    option("--factorization", metavar="NAMES", help="only these, with commas between")
    option("--top-k", metavar="K", default="2", help="experts per token of the sparse MoE (2)")
    add_switch(parser, "front", "ranks that no other beats in expert rank and expert span")


def run(arguments: argparse.Namespace) -> None:
    """Choose ranks and show them."""
    from tensormoe._files import check_picture
    from tensormoe.choosing import answer
    from tensormoe.cli._asked import parse_format, parse_layer
    from tensormoe.cli._console import make_console, print_json
    from tensormoe.cli._rank_show import (
        check_fronts,
        nothing_fits,
        plot_fronts_of,
        rank_csv,
        rank_markdown,
        show_rank,
    )

    form = parse_format(arguments)
    path = None if arguments.plot is None else check_picture(arguments.plot, "--plot")
    parts = ["rows", "others", "baselines"]
    if arguments.front or path is not None or form == "json":
        # what takes seconds is asked for where it is shown
        parts.append("fronts")
    asked = parse_layer(arguments, parts=parts)
    if arguments.front:
        check_fronts(asked)
    if form == "table":
        make_console()  # before seconds of work, not after
    found = answer(asked)
    if form == "json":
        print_json({"command": "rank", **found})
    elif form == "csv":
        sys.stdout.write(rank_csv(found, front=arguments.front))
    elif form == "markdown":
        sys.stdout.write(rank_markdown(asked, found, front=arguments.front))
    else:
        show_rank(make_console(), asked, found, front=arguments.front)
    if path is not None:
        plot_fronts_of(path, asked, found)
        if form == "table":
            make_console().print(f"drawn in {path}", soft_wrap=True)
    if found["best"] is None:
        raise nothing_fits(asked, found)
