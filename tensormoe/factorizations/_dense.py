"""Dense: 𝒲 itself, the honest baseline behind the same interface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, ClassVar

from tensormoe.backend import Array, Backend
from tensormoe.errors import RankError, ShapeError
from tensormoe.factorizations._base import Factorization, Split, checked_scheme, linear_std
from tensormoe.factorizations._initialization import Initializer
from tensormoe.factorizations._layouts import is_array
from tensormoe.factorizations._network import INPUT, OUTPUT, Factor, Leg, expert_leg


@dataclass(frozen=True)
class Dense(Factorization):
    """𝒲 stored as it is: N·I·O parameters, N full-rank experts; a dense (soft) MoE.

    Expert rank min(I, O), expert span min(ΠN_e, I·O).

    >>> from tensormoe import LayerSpec
    >>> LayerSpec(768, 768, experts=16, factorization=Dense(), bias=False).num_parameters
    9437184
    """

    rank: None = field(default=None, init=False, repr=False)
    name: ClassVar[str] = "dense"

    def rank_pattern(self, levels: int) -> tuple[str, ...]:
        return ()

    def with_rank(self, rank: tuple[int, ...]) -> Dense:
        if rank:
            raise RankError(f"rank must be None for dense, which has none; got {rank!r}.")
        return self

    def bonds(self, levels: int) -> tuple[int, ...]:
        return ()

    def factors(self, levels: int) -> tuple[Factor, ...]:
        return (Factor("weight", (*(expert_leg(e) for e in range(levels)), INPUT, OUTPUT)),)

    def bond_sizes(self, experts: tuple[int, ...], out_features: int) -> Mapping[Leg, int]:
        return {}

    def initializers(
        self, experts: tuple[int, ...], in_features: int, out_features: int, scheme: str
    ) -> Mapping[str, Initializer]:
        std = linear_std(in_features)
        if checked_scheme(scheme) == "paper":
            return {"weight": Initializer(std)}
        # a draw that all experts share, as strong as what sets them apart
        half, axes = std / sqrt(2.0), tuple(range(len(experts)))
        start = Initializer(half, center="shared", center_std=half, expert_axes=axes)
        return {"weight": start}

    def upcycled_factors(
        self,
        experts: tuple[int, ...],
        in_features: int,
        table: Array,
        split: Split,
        backend: Backend,
    ) -> dict[str, Array]:
        return {"weight": backend.namespace.broadcast_to(table, (*experts, *table.shape))}

    def to_tensorly(self, factors: Mapping[str, Array], xp: Any) -> Any:
        """The full tensor (experts…, in, out)."""
        return factors["weight"]

    def from_tensorly(self, decomposition: Any, xp: Any) -> dict[str, Array]:
        if not is_array(decomposition):
            raise ShapeError(
                f"a dense tensor must be one array; got {type(decomposition).__name__}. Stack the "
                "experts' matrices along the first axis."
            )
        if decomposition.ndim < 3:
            raise ShapeError(
                "a dense tensor must have at least 3 axes (experts…, in, out); got shape "
                f"{tuple(decomposition.shape)}."
            )
        return {"weight": xp.asarray(decomposition, copy=True)}
