"""Tucker: 𝒲 as a small core with one factor per mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, ClassVar

from tensormoe.backend import Array, Backend, device_of
from tensormoe.factorizations._base import (
    Factorization,
    Split,
    checked_rank,
    checked_scheme,
    linear_std,
    mode_names,
    ones_like_table,
    spread_rank,
    tiled_columns,
)
from tensormoe.factorizations._initialization import Initializer, noise_share
from tensormoe.factorizations._layouts import pair_of
from tensormoe.factorizations._network import INPUT, OUTPUT, Factor, Leg, expert_leg


@dataclass(frozen=True)
class Tucker(Factorization):
    """𝒲[n, i, o] = Σ G[p, q, s] U₁[n, p] U_in[i, q] U_out[o, s] (Oldfield et al., first version).

    pqs + Np + Iq + Os parameters. Expert rank min(q, s, I, O), expert span
    min(Πmin(N_e, p_e), min(q, I)·min(s, O)).

    Args:
        rank: the core's sizes, one per mode: experts, input, output; (8, 64, 64) for one level.
            One integer for all alike.

    Raises:
        RankError: an entry is not a positive integer, or their number does not fit the levels.

    >>> from tensormoe import LayerSpec
    >>> spec = LayerSpec(32, 32, experts=(8, 4), factorization=Tucker((4, 2, 16, 16)))
    >>> spec.shapes["core"], spec.expert_rank, spec.expert_span
    ((4, 2, 16, 16), 16, 8)
    """

    rank: int | tuple[int, ...]
    name: ClassVar[str] = "tucker"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", checked_rank(self.rank, single=False))

    def rank_pattern(self, levels: int) -> tuple[str, ...]:
        return ("a",) * levels + ("s", "s")

    def with_rank(self, rank: tuple[int, ...]) -> Tucker:
        return Tucker(rank)

    def bonds(self, levels: int) -> tuple[int, ...]:
        return spread_rank(
            self.rank, levels + 2, f"one per mode of {levels} expert level(s), in, out"
        )

    def factors(self, levels: int) -> tuple[Factor, ...]:
        modes = (*(expert_leg(level) for level in range(levels)), INPUT, OUTPUT)
        bonds = tuple(f"r{k}" for k in range(len(modes)))
        listed = zip(mode_names(levels), modes, bonds, strict=True)
        return (Factor("core", bonds), *(Factor(name, (mode, bond)) for name, mode, bond in listed))

    def bond_sizes(self, experts: tuple[int, ...], out_features: int) -> Mapping[Leg, int]:
        return {f"r{k}": size for k, size in enumerate(self.bonds(len(experts)))}

    def initializers(
        self, experts: tuple[int, ...], in_features: int, out_features: int, scheme: str
    ) -> Mapping[str, Initializer]:
        levels = len(experts)
        bonds = self.bonds(levels)
        core = prod(bonds)
        if checked_scheme(scheme) == "paper":
            # the paper's CP scheme mode by mode; the core is scaled to pass variance on
            starts = {
                f"expert_{e}": Initializer(0.0 if e else 1.0, "normal", "one")
                for e in range(levels)
            }
            return starts | {
                "core": Initializer(sqrt(bonds[-1] / core)),
                "input": Initializer(linear_std(in_features)),
                "output": Initializer(linear_std(bonds[-1])),
            }
        share = noise_share(levels)
        starts = {f"expert_{e}": Initializer(sqrt(share), "normal", "one") for e in range(levels)}
        return starts | {
            # bond activations of unit variance behind the core, whatever the expert bonds
            "core": Initializer(sqrt(bonds[-1] / (core * (1.0 + share) ** levels))),
            "input": Initializer(1.0 / sqrt(in_features)),
            "output": Initializer(1.0 / sqrt(3.0 * bonds[-1])),
        }

    def upcycled_factors(
        self,
        experts: tuple[int, ...],
        in_features: int,
        table: Array,
        split: Split,
        backend: Backend,
    ) -> dict[str, Array]:
        """As in the base class; every index of the expert bonds owns its share of the rank."""
        xp = backend.namespace
        *outer, rows, columns = self.bonds(len(experts))
        left, right = split(min(rows, columns))
        group, row, column = (
            xp.arange(size, device=device_of(table)) for size in (prod(outer), rows, columns)
        )
        owner, stride = 0 * row, 1
        for size in outer:
            # mixed radix, each digit turned by those before it: few components vary at all levels
            owner = owner * size + (row % stride + row // stride) % size
            stride *= size
        diagonal = row[:, None] == column[None, :]
        owned = owner[None, :] == group[:, None]
        core = xp.astype(diagonal[None, :, :] & owned[:, :, None], table.dtype)
        stored = {
            f"expert_{level}": ones_like_table(table, shape, backend)
            for level, shape in enumerate(zip(experts, outer, strict=True))
        }
        return stored | {
            "core": backend.reshape(core, (*outer, rows, columns)),
            "input": tiled_columns(left, rows, xp),
            "output": tiled_columns(backend.permute(right, (1, 0)), columns, xp),
        }

    def to_tensorly(self, factors: Mapping[str, Array], xp: Any) -> Any:
        """(core, factors) of ``tensorly.tucker_to_tensor``."""
        listed = [array for name, array in factors.items() if name not in ("core", "bias")]
        return factors["core"], listed

    def from_tensorly(self, decomposition: Any, xp: Any) -> dict[str, Array]:
        core, factors = pair_of(decomposition, self.name, "core")
        listed = zip(("core", *mode_names(len(factors) - 2)), (core, *factors), strict=True)
        return {name: xp.asarray(array, copy=True) for name, array in listed}
