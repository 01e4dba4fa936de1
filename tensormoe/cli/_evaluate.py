"""``tensormoe evaluate``: what a compression does to what a model predicts."""

from __future__ import annotations

import argparse

from tensormoe.cli._calibrate_model import add_windows, torch_compression, windows
from tensormoe.cli._commands import Commands
from tensormoe.cli._console import print_json
from tensormoe.errors import SpecError


def add_parser(commands: Commands) -> None:
    """The options of the command."""
    parser = commands.add_parser(
        "evaluate",
        description="Compare what a model and compressed ones predict for a text: losses, "
        "agreement, divergence, speed, and what each layer alone does; of several, which one wins.",
        epilog="example: tensormoe evaluate Mixtral-8x7B Mixtral-25 --data wiki.txt --layers",
    )
    option = parser.add_argument
    option("model", metavar="MODEL", help="the folder of a model of transformers")
    option(
        "compressed",
        metavar="COMPRESSED",
        nargs="+",
        help="the folder of the compressed one, or several to compare",
    )
    option("--data", metavar="TEXT", required=True, help="a text file in UTF-8")
    option("--tokenizer", metavar="DIR", help="folder of the tokenizer (default: MODEL)")
    add_windows(parser)
    option("--layers", action="store_true", help="the effect of each layer compressed alone")
    option("--dtype", default="auto", metavar="NAME", help="that both run in (that of the files)")
    option("--device", default="cpu", metavar="NAME", help="that both run on: cuda (cpu)")
    option("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Compare two models, and print it."""
    place = {"dtype": arguments.dtype, "device": arguments.device}
    options = {"tokenizer": arguments.tokenizer, "windows": windows(arguments), **place}
    measure = torch_compression()
    if len(arguments.compressed) > 1:
        if arguments.layers:
            raise SpecError(
                "--layers is of one compressed model; got several. Evaluate each by itself."
            )
        found = measure.compare_checkpoints(
            arguments.model, arguments.compressed, arguments.data, **options
        )
    else:
        (compressed,) = arguments.compressed
        found = measure.evaluate_checkpoints(
            arguments.model, compressed, arguments.data, layers=arguments.layers, **options
        )
    if arguments.json:
        print_json({"command": "evaluate", **found.to_dict()})
    else:
        print(found)
