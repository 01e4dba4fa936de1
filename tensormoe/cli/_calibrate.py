"""``tensormoe calibrate``: what it takes."""

from __future__ import annotations

import argparse

from tensormoe.cli._commands import Commands


def add_parser(commands: Commands) -> None:
    """The options of the command."""
    parser = commands.add_parser(
        "calibrate",
        description="Measure this machine's roofline with a library and keep it in the user's "
        "config folder, where rank and plan find it.",
    )
    parser.add_argument(
        "--backend", default="numpy", metavar="NAME", help="numpy, torch or jax (default: numpy)"
    )
    parser.add_argument("--dry-run", action="store_true", help="measure and print, keep nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Measure, show and keep."""
    from tensormoe.cli.calibration import run_calibrate

    run_calibrate(arguments)
