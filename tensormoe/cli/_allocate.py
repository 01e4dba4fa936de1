"""``tensormoe allocate``: one budget for the layers of a whole model."""

from __future__ import annotations

import argparse
import os
from typing import Any

from tensormoe.cli._calibrate_model import torch_compression
from tensormoe.cli._commands import Commands
from tensormoe.errors import SpecError

# windows of a text that a model runs at a time
_BATCH = 8


def add_parser(commands: Commands) -> None:
    """The options of the command."""
    parser = commands.add_parser(
        "allocate",
        description="Share one budget out over the layers of a model: which factorization and "
        "rank each of them gets, from its config.json alone, or by what the model loses on a text.",
        epilog="example: tensormoe allocate Mixtral-8x7B/config.json --budget 25% --by size "
        "--output allocation.json",
    )
    option = parser.add_argument
    option("model", metavar="MODEL", help="a config.json, or the folder of a model")
    option(
        "--budget",
        metavar="SIZE",
        help="25%% of what is replaced, a number of parameters (1.5G), or bytes (2GiB)",
    )
    option("--by", metavar="NAME", help="equal, size, or sensitivity (equal; with --data the last)")
    option("--factorization", default="cp", metavar="NAMES", help="with commas between (cp)")
    option(
        "--what",
        metavar="PARTS",
        help="experts, mlp, attention or linear, with commas between (experts if there are any, "
        "else mlp)",
    )
    option("--experts", default="16", metavar="EXPERTS", help="of new mixtures: 16, or 4x8 (16)")
    option("--gate", default="entmax", metavar="NAME", help="of new mixtures, or none (entmax)")
    option("--data", metavar="TEXT", help="a text file that sensitivities are measured on")
    option("--context", default="128", metavar="N", help="tokens of a window of the text (128)")
    option("--windows", default="32", metavar="N", help="how many are run at each rank (32)")
    option("--output", metavar="FILE", help="write the allocation, for compress --allocation")
    option("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Check the words, allocate, and show or write the result."""
    from tensormoe.choosing._words import parse_experts, parse_names
    from tensormoe.cli._console import make_console, print_json
    from tensormoe.selection import allocate
    from tensormoe.selection._model_sites import checked_parts

    if arguments.budget is None:
        raise SpecError("--budget must be given; got none. Pass for instance --budget 25%.")
    budget, unit = _budget(arguments.budget)
    by = arguments.by or (None if arguments.data is None else "sensitivity")
    if (by == "sensitivity") != (arguments.data is not None):
        raise SpecError(
            "--data must be given with --by sensitivity, and with nothing else; got "
            f"--by {by or 'equal'} and {'no --data' if arguments.data is None else '--data'}."
        )
    if arguments.output is not None:
        _check_output(arguments.output)
    parts = None
    if arguments.what is not None:
        parts = checked_parts(tuple(arguments.what.split(",")))
    model, inputs = _model(arguments)
    found = allocate(
        model,
        budget,
        by=by,
        unit=unit,
        factorization=parse_names(arguments.factorization),
        what=parts,
        experts=parse_experts(arguments.experts),
        gate=None if arguments.gate == "none" else arguments.gate.replace("-", "_"),
        inputs=inputs,
    )
    if arguments.output is not None:
        found.save(arguments.output)
    if arguments.json:
        print_json({"command": "allocate", **found.to_dict()})
        return
    console = make_console()
    console.print(str(found), soft_wrap=True)
    if arguments.output is not None:
        console.print(f"written to {arguments.output}", soft_wrap=True)


def _budget(text: str) -> tuple[int | str, str]:
    """A share, or a number of parameters or bytes, with its unit.

    >>> _budget("25%"), _budget("1.5G"), _budget("2GiB")
    (('25%', 'parameters'), (1500000000, 'parameters'), (2147483648, 'bytes'))
    """
    from tensormoe.choosing._words import parse_bytes, parse_parameters

    if text.endswith("%"):
        return text, "parameters"
    if text[-1:] in ("b", "B"):
        size = parse_bytes(text, "--budget")
        assert size is not None
        return size, "bytes"
    return parse_parameters(text, "--budget"), "parameters"


def _check_output(name: str) -> None:
    """Refuse, before any work, a file that can't be written.

    Raises:
        SpecError: its folder does not exist, or it is a folder.
    """
    folder = os.path.dirname(name) or "."
    if not os.path.isdir(folder) or os.path.isdir(name):
        raise SpecError(f"--output must be a file in a folder that exists; got {name!r}.")


def _model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """A stand-in for the model, and batches of ids of the text if it is to be run."""
    from tensormoe.choosing._words import parse_size
    from tensormoe.selection._allocation import read_json
    from tensormoe.selection._config_sites import FAMILIES

    name = arguments.model
    if arguments.data is None:
        path = os.path.join(name, "config.json") if os.path.isdir(name) else name
        values = read_json(path, "a configuration")
        family = values.get("model_type") if isinstance(values, dict) else None
        if isinstance(family, str) and family not in FAMILIES and _has_transformers():
            # any other family, by the layers that its code makes
            from tensormoe_torch.allocation import empty_model

            return empty_model(values), None
        return name, None
    # before a model is loaded, not after
    if not os.path.isfile(arguments.data):
        raise SpecError(f"--data must be a text file; {arguments.data!r} is none.")
    models = torch_compression()
    cut = models.TextWindows(
        parse_size(arguments.windows, "--windows"),
        parse_size(arguments.context, "--context"),
        batch=_BATCH,
    )
    model = models.load_model(name)
    ids = models.load_tokens(arguments.data, name, (model,))
    return model, cut.of(ids, model)


def _has_transformers() -> bool:
    from tensormoe._extras import missing

    return missing("tensormoe allocate", ("torch", "transformers"), "huggingface") is None
