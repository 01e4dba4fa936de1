"""A layer cut over several devices: which leg, and what each of them would take."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tensormoe import LayerSpec
from tensormoe._format import format_bytes, format_count, format_parameters, format_time
from tensormoe.choosing._words import parse_bytes, parse_size
from tensormoe.cli._console import make_table
from tensormoe.cli._figures import cost_dict
from tensormoe.cli._layer_arguments import LayerArguments
from tensormoe.errors import SpecError
from tensormoe.planning import CutLayer, Roofline, Routing, compare_legs

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("leg", "of each", "parameters", "FLOPs", "exchanged", "time")


def with_link(device: Roofline, arguments: argparse.Namespace) -> Roofline:
    """The device, with the link speed that a command names.

    Raises:
        SpecError: ``--link`` without ``--devices``, or devices whose link is not known.
    """
    link = parse_bytes(arguments.link, "--link")
    if arguments.devices is None:
        for name, value in (("--link", link), ("--leg", arguments.leg)):
            if value is not None:
                raise SpecError(f"{name} is for a layer cut over --devices; got none. Give both.")
        return device
    if link is not None:
        return replace(device, link_bandwidth=float(link))
    if device.link_bandwidth is None:
        raise SpecError(
            f"--devices needs the speed of the link between them; it is not known for "
            f"{device.name}. Pass --link 10GB, bytes per second in one direction, or --device h100."
        )
    return device


def cut_layers(
    arguments: argparse.Namespace, spec: LayerSpec, given: LayerArguments
) -> tuple[tuple[CutLayer, ...], CutLayer] | None:
    """The layer cut along each leg that divides, and along the one that is asked for.

    None without ``--devices``; the leg is the fastest without ``--leg``.

    Raises:
        SpecError: a leg that the layer does not have, or that does not divide.
    """
    if arguments.devices is None:
        return None
    devices = parse_size(arguments.devices, "--devices")
    if arguments.leg is not None:
        spec.network.slice(arguments.leg, devices)
    found = compare_legs(
        spec.network,
        devices,
        batch=given.batch,
        routing=Routing(given.top_k),
        training=arguments.training,
        roofline=given.device,
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
