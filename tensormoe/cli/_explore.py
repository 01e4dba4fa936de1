"""``tensormoe explore``: what it takes."""

from __future__ import annotations

import argparse

from tensormoe.cli._commands import Commands
from tensormoe.cli._options import add_switch


def add_parser(commands: Commands) -> None:
    """The options of the command."""
    parser = commands.add_parser(
        "explore",
        description="One HTML page, which needs no network, with what every expert does: of a data "
        "file that Exploration.save wrote, or of a layer's checkpoint, which runs in NumPy.",
        epilog="example: tensormoe explore head.safetensors --inputs x.npy --labels y.npy --logits "
        "--images pictures.npy --output experts.html",
    )
    option = parser.add_argument
    option("source", metavar="SOURCE", help="a .json data file, or a .safetensors checkpoint")
    option("--output", metavar="FILE", help=".html or .json (default: SOURCE with .html)")
    option("--inputs", metavar="FILE", help="the layer's inputs, an array in a .npy file")
    option("--labels", metavar="FILE", help="one class per input, in a .npy file")
    option(
        "--coefficients",
        action="append",
        default=[],
        metavar="FILE",
        help="of a layer without a gate, in .npy files: once for each level",
    )
    add_switch(parser, "logits", "the layer's outputs are logits of the classes")
    option("--images", metavar="FILE", help="the inputs as images, in a .npy file")
    option("--texts", metavar="FILE", help="the inputs as texts, one per line")
    option("--class-names", metavar="FILE", help="names of the classes, one per line")
    option("--top", metavar="K", help="inputs that are shown per expert (default: 8)")
    option("--title", metavar="TEXT", help="of the page (default: the checkpoint's name)")
    option("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Make a page of experts."""
    from tensormoe.cli._explore_run import run_explore

    run_explore(arguments)
