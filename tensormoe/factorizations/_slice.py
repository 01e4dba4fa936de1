"""Slice: one device's part of a factorization that is cut along a leg."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tensormoe.errors import SpecError
from tensormoe.factorizations._base import Factorization
from tensormoe.factorizations._initialization import Initializer
from tensormoe.factorizations._network import INPUT, OUTPUT, Factor, Leg, Network, expert_leg


@dataclass(frozen=True)
class Slice(Factorization):
    """A factorization with one of its legs cut into equal slices, one per device.

    A layer with it is the part that one device runs; :meth:`tensormoe.LayerSpec.shard` makes such
    layers. Sizes of the layer are those of the part, the rank is that of the whole.

    Args:
        of: the whole factorization.
        leg: that is cut.
        devices: P, the number of slices.
    """

    of: Factorization
    leg: Leg
    devices: int
    name: ClassVar[str] = "slice"

    @property
    def rank(self) -> Any:
        """The rank of the whole."""
        return self.of.rank

    def rank_pattern(self, levels: int) -> tuple[str, ...]:
        return self.of.rank_pattern(levels)

    def with_rank(self, rank: tuple[int, ...]) -> Slice:
        return Slice(self.of.with_rank(rank), self.leg, self.devices)

    def bonds(self, levels: int) -> tuple[int, ...]:
        return self.of.bonds(levels)

    def factors(self, levels: int) -> tuple[Factor, ...]:
        return self.of.factors(levels)

    def bond_sizes(self, experts: tuple[int, ...], out_features: int) -> Mapping[Leg, int]:
        return self.of.bond_sizes(experts, out_features)

    def network(
        self, experts: tuple[int, ...], in_features: int, out_features: int, bias: bool
    ) -> Network:
        sizes = resized(experts, in_features, out_features, self.leg, lambda n: n * self.devices)
        return self.of.network(*sizes, bias).slice(self.leg, self.devices)

    def initializers(
        self, experts: tuple[int, ...], in_features: int, out_features: int, scheme: str
    ) -> Mapping[str, Initializer]:
        """Refuse: some values are drawn for a leg as a whole.

        Raises:
            SpecError: always.
        """
        raise SpecError(
            f"initial values must be those of a whole layer; got its slice along {self.leg!r} of "
            f"{self.devices} devices. Initialize the whole layer, and cut its arrays."
        )


def resized(
    experts: tuple[int, ...],
    in_features: int,
    out_features: int,
    leg: Leg,
    of: Callable[[int], int],
) -> tuple[tuple[int, ...], int, int]:
    """The open sizes of a layer with another one for a leg, if that is open.

    Args:
        experts: one size per level.
        in_features: I.
        out_features: O.
        leg: whose size changes.
        of: from the size to the new one.
    """
    levels = tuple(
        of(size) if leg == expert_leg(level) else size for level, size in enumerate(experts)
    )
    return (
        levels,
        of(in_features) if leg == INPUT else in_features,
        of(out_features) if leg == OUTPUT else out_features,
    )
