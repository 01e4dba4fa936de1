"""A layer cut over several devices: which leg, and what each of them would take."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, TypeAlias

from tensormoe import LayerSpec
from tensormoe._format import format_bytes, format_count, format_parameters, format_time
from tensormoe.choosing import Request
from tensormoe.choosing._explore import cost_dict
from tensormoe.cli._console import make_table
from tensormoe.planning import CutLayer, Routing, compare_legs

if TYPE_CHECKING:
    from rich.table import Table

Cuts: TypeAlias = tuple[tuple[CutLayer, ...], CutLayer]
"""The legs that a layer can be cut along, and the one that is taken."""

_COLUMNS = ("leg", "of each", "parameters", "FLOPs", "exchanged", "time")


def cut_layers(
    arguments: argparse.Namespace, spec: LayerSpec, asked: Request, routing: Routing
) -> Cuts | None:
    """The layer cut along each leg that divides, and along the one that is asked for.

    None without ``--devices``; the leg is the fastest without ``--leg``.

    Raises:
        SpecError: a leg that the layer does not have, or that does not divide.
    """
    if arguments.devices is None:
        return None
    if arguments.leg is not None:
        spec.network.slice(arguments.leg, asked.devices)
    found = compare_legs(
        spec.network,
        asked.devices,
        batch=asked.batch,
        routing=routing,
        training=asked.training,
        itemsize=asked.itemsize,
        roofline=asked.device,
    )
    chosen = arguments.leg or found[0].leg
    return found, next(each for each in found if each.leg == chosen)


def legs_table(found: tuple[CutLayer, ...], chosen: CutLayer) -> Table:
    """One row per leg; the chosen one is marked."""
    table = make_table(*_COLUMNS)
    for each in found:
        size = each.network.sizes[each.leg]
        table.add_row(
            f"{each.leg} {'*' if each is chosen else ''}".rstrip(),
            f"{size:,} of {each.network.whole.sizes[each.leg]:,}",
            format_parameters(each.cost.parameters),
            format_count(each.cost.flops),
            format_bytes(each.cost.communicated),
            format_time(each.time),
        )
    return table


def legs_dict(found: tuple[CutLayer, ...], chosen: CutLayer) -> dict[str, Any]:
    """The same in plain values."""
    return {
        "devices": chosen.network.cut.devices if chosen.network.cut else 1,
        "leg": chosen.leg,
        "legs": [
            {
                "leg": each.leg,
                "size": each.network.sizes[each.leg],
                **cost_dict(each.cost),
                "communicated": each.cost.communicated,
                "time": each.time,
            }
            for each in found
        ],
    }
