"""Canonical names of arrays: of a block, of its layers, of gates and routers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def block_names(first: Mapping[str, T], second: Mapping[str, T]) -> dict[str, T]:
    """Values of two layers, and of the gate of both, under the names that their block gives them.

    >>> block_names({"factors.input": 1, "gate.projection_0": 2}, {"factors.input": 3})
    {'first.factors.input': 1, 'gate.projection_0': 2, 'second.factors.input': 3}
    """
    return {
        name if name.startswith("gate.") else f"{layer}.{name}": value
        for layer, values in (("first", first), ("second", second))
        for name, value in values.items()
    }


def split_names(values: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Values by what comes before the first dot of their names.

    >>> split_names({"first.factors.input": 1, "gate.projection_0": 2})
    {'first': {'factors.input': 1}, 'gate': {'projection_0': 2}}
    """
    parts: dict[str, dict[str, T]] = {}
    for name, value in values.items():
        part, _, short = name.partition(".")
        parts.setdefault(part, {})[short] = value
    return parts


def makes_logits(name: str) -> bool:
    """Whether an array is of a gate or a router, by its name.

    >>> makes_logits("gate.projection_0"), makes_logits("first.router.projection")
    (True, True)
    >>> makes_logits("experts.projections.down_proj.factors.weight")
    False
    """
    return name.startswith("gate.") or "router" in name.split(".")[:-1]
