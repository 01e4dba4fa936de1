"""``tensormoe demo``: from a budget to trained experts, with NumPy alone."""

from __future__ import annotations

import argparse

from tensormoe._extras import require
from tensormoe._files import make_folder
from tensormoe.choosing._words import parse_experts, parse_size
from tensormoe.cli._console import make_console
from tensormoe.errors import SpecError

__all__ = ["run_demo"]

_NEEDED = ("rich", "numpy", "scipy", "sklearn", "matplotlib")


def run_demo(arguments: argparse.Namespace) -> None:
    """Check the words and what is installed, then run the demo."""
    experts = parse_experts(arguments.experts)
    epochs = parse_size(arguments.epochs, "--epochs")
    if not arguments.seed.isascii() or not arguments.seed.isdigit():
        raise SpecError(f"--seed must be an integer of at least 0; got {arguments.seed!r}.")
    for package in _NEEDED:
        require("tensormoe demo", (package,), "demo")
    folder = make_folder(arguments.out)
    # imports NumPy and the layers on it
    from tensormoe.cli._demo._story import tell

    console = make_console(quiet=arguments.json)
    tell(console, folder, experts, epochs, int(arguments.seed), as_json=arguments.json)
