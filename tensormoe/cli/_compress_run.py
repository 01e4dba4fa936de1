"""``tensormoe compress``: the experts of a model on disk, decomposed and written anew."""

from __future__ import annotations

import argparse
import re
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from tensormoe._extras import require
from tensormoe._rounding import AUTO
from tensormoe.choosing._words import parse_bytes, parse_parameters, parse_rank
from tensormoe.cli._compress_show import (
    bars,
    plan_dict,
    result_dict,
    show_plan,
    show_result,
)
from tensormoe.cli._console import make_console, print_json
from tensormoe.cli._profile import resolve_device
from tensormoe.compression import (
    Compression,
    compress_checkpoint,
    plan_compression,
)
from tensormoe.compression._cluster import connected
from tensormoe.errors import BudgetError, SpecError
from tensormoe.selection import Allocation

if TYPE_CHECKING:
    from distributed import Client


def run_compress(arguments: argparse.Namespace) -> None:
    """Compress a model, or say what that would do."""
    settings = _settings(arguments)
    limit = parse_bytes(arguments.max_memory, "--max-memory")
    if arguments.dry_run:
        device = resolve_device(arguments.device)
        plan = plan_compression(arguments.model, settings, roofline=device)
        if arguments.json:
            print_json(plan_dict(plan, device, limit))
        else:
            show_plan(plan, device, limit)
        return
    if arguments.output is None:
        raise SpecError("--output must be given; got none. Name a folder that does not exist yet.")
    require("tensormoe compress", ("numpy",), "numpy")
    # before hours of work, not after
    console = None if arguments.json else make_console()
    with _client(arguments.scheduler) as client, bars(console) as callback:
        result = compress_checkpoint(
            arguments.model,
            arguments.output,
            settings,
            max_memory=limit,
            callback=callback,
            client=client,
        )
    if console is None:
        print_json(result_dict(result, settings))
    else:
        show_result(console, result, settings)


def _client(address: str | None) -> AbstractContextManager[Client | None]:
    return nullcontext() if address is None else connected(address)


def _settings(arguments: argparse.Namespace) -> Compression:
    """The words of the command, checked."""
    if not re.fullmatch("[0-9]{1,18}", arguments.seed):
        raise SpecError(
            f"--seed must be a non-negative integer; got {arguments.seed!r}. Write digits: 0."
        )
    allocation = None if arguments.allocation is None else Allocation.load(arguments.allocation)
    return Compression(
        _factorization(arguments.factorization, allocation),
        rank=parse_rank(arguments.rank),
        budget=None if arguments.budget is None else _budget(arguments.budget),
        tolerance=None if arguments.tolerance is None else _tolerance(arguments.tolerance),
        experts=tuple(arguments.experts),
        preset=None if arguments.preset is None else arguments.preset.replace("-", "_"),
        layout=arguments.layout.replace("-", "_"),
        dense=arguments.dense,
        compare=arguments.svd,
        seed=int(arguments.seed),
        seconds=None if arguments.seconds is None else _seconds(arguments.seconds),
        allocation=allocation,
        calibration=arguments.calibration,
        weighting=arguments.weighting,
        expert_weights=arguments.expert_weights,
        share=arguments.share,
        bits=None if arguments.bits is None else _bits(arguments.bits),
        gate_up=arguments.gate_up,
    )


def _factorization(text: str | None, allocation: Allocation | None) -> str | tuple[str, ...]:
    """The name or names that were given, or that of an allocation.

    >>> _factorization("low-rank,tucker", None)
    ('low_rank', 'tucker')
    """
    if text is not None:
        names = tuple(each.strip() for each in text.replace("-", "_").split(","))
        return names if len(names) > 1 else names[0]
    if allocation is None or not allocation.layers:
        return "tensor_ring"
    return allocation.layers[0].factorizations[0].name


def _bits(text: str) -> int | str:
    """Bits of an entry.

    >>> _bits("8")
    8
    """
    if text not in ("4", "8", "16", AUTO):
        raise SpecError(f"--bits must be 8, 4, 16 or auto; got {text!r}. Write 8.")
    return text if text == AUTO else int(text)


def _budget(text: str) -> int | float:
    """A share of the experts' entries, or a number of them.

    >>> _budget("25%"), _budget("1.5G")
    (0.25, 1500000000)
    """
    if not text.endswith("%"):
        return parse_parameters(text, "--budget")
    share = _number(text[:-1])
    if share is None or not 0 < share < 100:
        raise BudgetError(
            f"a share of --budget must lie between 0% and 100%; got {text!r}. Write 25%, or a "
            "number of parameters such as 1.5G."
        )
    return share / 100


def _tolerance(text: str) -> float:
    """A relative error, as a number or in percent.

    >>> _tolerance("0.1"), _tolerance("10%")
    (0.1, 0.1)
    """
    percent = text.endswith("%")
    number = _number(text.removesuffix("%"))
    if number is None:
        raise SpecError(f"--tolerance must be a number; got {text!r}. Write 0.1 or 10%.")
    return number / 100 if percent else number


def _seconds(text: str) -> float:
    """A time limit.

    >>> _seconds("90")
    90.0
    """
    number = _number(text)
    if not number:
        raise SpecError(f"--seconds must be a positive number; got {text!r}. Write 90.")
    return number


def _number(text: str) -> float | None:
    plain = re.fullmatch(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]{1,3})?", text.strip(), re.I)
    return float(text) if plain else None
