"""``tensormoe plan``: how a layer runs and what that costs."""

from __future__ import annotations

import argparse
import sys

from tensormoe.cli._commands import Commands
from tensormoe.cli._options import add_layer, add_switch


def add_parser(commands: Commands) -> None:
    """The options of the command."""
    parser = commands.add_parser(
        "plan",
        description="The contraction plan of a layer, or of both layers of a block, with the cost "
        "of every step, and a drawing of its tensor network.",
        epilog="example: tensormoe plan 768 768 512 --factorization tensor_ring --rank 4,4,94",
    )
    add_layer(parser, "counted in every figure; with --top-k, none is")
    option = parser.add_argument
    option("--factorization", default="cp", metavar="NAME", help="how 𝒲 is stored (default: cp)")
    option(
        "--rank",
        metavar="RANK",
        help="one size for all bonds, or one per bond: 4,4,94; of a block, for each of its layers "
        "(default: the best within the budget)",
    )
    option("--top-k", metavar="K", help="coefficients come as K values and indices a level")
    add_switch(parser, "prepared", "weight-only steps have run beforehand")
    option("--memory-limit", metavar="BYTES", help="cut the batch into chunks that keep to 64MiB")
    option("--leg", metavar="LEG", help="cut this leg: r, o, n0, … (default: the fastest)")


def run(arguments: argparse.Namespace) -> None:
    """Plan a layer or block and show it."""
    from tensormoe._files import check_picture
    from tensormoe.cli._asked import parse_format, placed
    from tensormoe.cli._console import make_console, print_json
    from tensormoe.cli._plan_show import (
        plan_csv,
        plan_dict,
        plan_markdown,
        save_networks,
        show_plan,
    )
    from tensormoe.cli._planned import plan_asked
    from tensormoe.errors import RequestError, TensormoeError

    form = parse_format(arguments)
    path = None if arguments.plot is None else check_picture(arguments.plot, "--plot")
    try:
        planned = plan_asked(arguments)
    except RequestError:
        raise
    except TensormoeError as error:
        raise placed(error, arguments) from None
    if form == "json":
        print_json({"command": "plan", **plan_dict(planned)})
    elif form == "csv":
        sys.stdout.write(plan_csv(planned))
    elif form == "markdown":
        sys.stdout.write(plan_markdown(planned))
    else:
        show_plan(make_console(), planned)
    if path is not None:
        for saved in save_networks(planned, path):
            if form == "table":
                make_console().print(f"drawn in {saved}", soft_wrap=True)
