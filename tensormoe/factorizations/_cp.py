"""CP: 𝒲 as a sum of rank-one terms, one bond shared by every factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

from tensormoe.backend import Array, Backend, device_of
from tensormoe.errors import RankError
from tensormoe.factorizations._base import (
    Factorization,
    Split,
    checked_rank,
    checked_scheme,
    linear_std,
    mode_names,
    ones_like_table,
)
from tensormoe.factorizations._initialization import Initializer, noise_share
from tensormoe.factorizations._layouts import pair_of, weights_of
from tensormoe.factorizations._network import INPUT, OUTPUT, Factor, Leg, expert_leg


@dataclass(frozen=True)
class CP(Factorization):
    """𝒲[n, i, o] = Σ_r U₁[n, r] U_in[i, r] U_out[o, r] (Oldfield et al. 2024, section 3.2).

    R (N + I + O) parameters and as many multiply-adds a token; with E levels, N is replaced by
    ΣN_e. Expert rank min(R, I, O), expert span min(ΠN_e, R, I·O).

    Args:
        rank: R, the number of rank-one terms.

    Raises:
        RankError: ``rank`` is not one positive integer.

    >>> from tensormoe import LayerSpec
    >>> LayerSpec(768, 768, experts=512, factorization=CP(rank=256), bias=False).num_parameters
    524288
    """

    rank: int
    name: ClassVar[str] = "cp"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", checked_rank(self.rank, single=True))

    def rank_pattern(self, levels: int) -> tuple[str, ...]:
        return ("R",)

    def with_rank(self, rank: tuple[int, ...]) -> CP:
        if len(rank) != 1:
            raise RankError(f"rank must have one bond for cp; got {len(rank)}: {rank!r}.")
        return CP(*rank)

    def bonds(self, levels: int) -> tuple[int, ...]:
        return (self.rank,)

    def factors(self, levels: int) -> tuple[Factor, ...]:
        modes = (*(expert_leg(level) for level in range(levels)), INPUT, OUTPUT)
        return tuple(
            Factor(name, (mode, "r")) for name, mode in zip(mode_names(levels), modes, strict=True)
        )

    def bond_sizes(self, experts: tuple[int, ...], out_features: int) -> Mapping[Leg, int]:
        return {"r": self.rank}

    def initializers(
        self, experts: tuple[int, ...], in_features: int, out_features: int, scheme: str
    ) -> Mapping[str, Initializer]:
        levels = range(len(experts))
        if checked_scheme(scheme) == "paper":
            # first level N(1, 1), further levels all ones: appendix F.2
            starts = {
                f"expert_{e}": Initializer(0.0 if e else 1.0, "normal", "one") for e in levels
            }
            output = Initializer(linear_std(self.rank))
            return starts | {"input": Initializer(linear_std(in_features)), "output": output}
        share = noise_share(len(experts))
        starts = {f"expert_{e}": Initializer(sqrt(share), "normal", "one") for e in levels}
        energy = self.rank * (1.0 + share) ** len(experts)
        return starts | {
            "input": Initializer(1.0 / sqrt(in_features)),
            "output": Initializer(1.0 / sqrt(3.0 * energy)),
        }

    def upcycled_factors(
        self,
        experts: tuple[int, ...],
        in_features: int,
        table: Array,
        split: Split,
        backend: Backend,
    ) -> dict[str, Array]:
        left, right = split(self.rank)
        stored = {
            f"expert_{level}": ones_like_table(table, (count, self.rank), backend)
            for level, count in enumerate(experts)
        }
        return stored | {"input": left, "output": backend.permute(right, (1, 0))}

    def to_tensorly(self, factors: Mapping[str, Array], xp: Any) -> Any:
        """(weights, factors) of ``tensorly.cp_to_tensor``: unit weights, factors (n, R)."""
        listed = [array for name, array in factors.items() if name != "bias"]
        ones = xp.ones((self.rank,), dtype=listed[0].dtype, device=device_of(listed[0]))
        return ones, listed

    def from_tensorly(self, decomposition: Any, xp: Any) -> dict[str, Array]:
        weights, factors = pair_of(decomposition, self.name, "weights")
        names = mode_names(len(factors) - 2)
        arrays = {name: xp.asarray(a, copy=True) for name, a in zip(names, factors, strict=True)}
        if weights is not None:
            arrays["output"] = arrays["output"] * weights_of(weights, self.rank, self.name)
        return arrays
