"""``tensormoe demo``: from a budget to trained experts, with NumPy alone."""

from __future__ import annotations

import argparse

from tensormoe.cli._commands import Commands

_NEEDED = ("rich", "numpy", "scipy", "sklearn", "matplotlib")


def add_parser(commands: Commands) -> None:
    """The options of the command."""
    parser = commands.add_parser(
        "demo",
        description="Choose ranks by the budget of a linear layer, train on scikit-learn's "
        "digits with NumPy alone, prove that factorized is unfactorized, and draw what the "
        "experts do.",
    )
    option = parser.add_argument
    option("--out", default="out", metavar="DIR", help="where files go (default: ./out)")
    option("--experts", default="32", metavar="EXPERTS", help="number of experts (default: 32)")
    option("--epochs", default="60", metavar="N", help="passes over the images (default: 60)")
    option("--seed", default="0", metavar="N", help="of initial values and batches (default: 0)")
    option("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Check the words and what is installed, then run the demo."""
    from tensormoe._extras import require
    from tensormoe._files import make_folder
    from tensormoe.choosing._words import parse_experts, parse_size
    from tensormoe.cli._console import make_console
    from tensormoe.errors import SpecError

    experts = parse_experts(arguments.experts)
    epochs = parse_size(arguments.epochs, "--epochs")
    if not arguments.seed.isascii() or not arguments.seed.isdigit():
        raise SpecError(
            f"--seed must be an integer of at least 0; got {arguments.seed!r}. Write digits: 0."
        )
    for package in _NEEDED:
        require("tensormoe demo", (package,), "demo")
    folder = make_folder(arguments.out)
    # imports NumPy and the layers on it
    from tensormoe.cli._demo._story import tell

    console = make_console(quiet=arguments.json)
    tell(console, folder, experts, epochs, int(arguments.seed), as_json=arguments.json)
