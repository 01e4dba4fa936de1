"""Low rank: every expert as a product of two matrices of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from tensormoe.backend import Array, Backend
from tensormoe.errors import RankError
from tensormoe.factorizations._base import (
    Factorization,
    Split,
    checked_rank,
    checked_scheme,
    linear_std,
)
from tensormoe.factorizations._initialization import Initializer, apart, noise_share
from tensormoe.factorizations._network import INPUT, OUTPUT, Factor, Leg, expert_leg


@dataclass(frozen=True)
class LowRank(Factorization):
    """𝒲[n] = U_n V_n, a product of rank r for each expert; nothing is shared.

    Decomposed, this is the truncated singular value decomposition of every expert by itself, and
    with second moments of its inputs the whitened one of SVD-LLM (Wang et al. 2025, arXiv
    2403.12403), of its outputs too where those are given. It is what factors that share something
    have to beat.

    N·r·(I + O) parameters; with E levels, N = ΠN_e. Expert rank min(r, I, O) and expert span
    min(N, I·O) whatever r is.

    Args:
        rank: r, of every expert.

    Raises:
        RankError: ``rank`` is not one positive integer.

    >>> from tensormoe import LayerSpec
    >>> spec = LayerSpec(2048, 768, experts=64, factorization=LowRank(128), bias=False)
    >>> spec.expert_rank, spec.expert_span, spec.num_parameters == 64 * 128 * (2048 + 768)
    (128, 64, True)
    """

    rank: int
    name: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", checked_rank(self.rank, single=True))

    def rank_pattern(self, levels: int) -> tuple[str, ...]:
        return ("R",)

    def with_rank(self, rank: tuple[int, ...]) -> LowRank:
        if len(rank) != 1:
            raise RankError(f"rank must have one bond for {self.name}; got {len(rank)}: {rank!r}.")
        return LowRank(*rank)

    def bonds(self, levels: int) -> tuple[int, ...]:
        return (self.rank,)

    def factors(self, levels: int) -> tuple[Factor, ...]:
        experts = tuple(expert_leg(level) for level in range(levels))
        # the experts behind the mode: their sum is one matrix product then
        return tuple(
            Factor(name, (mode, *experts, "r"))
            for mode, name in ((INPUT, "input"), (OUTPUT, "output"))
        )

    def bond_sizes(self, experts: tuple[int, ...], out_features: int) -> Mapping[Leg, int]:
        return {"r": self.rank}

    def initializers(
        self, experts: tuple[int, ...], in_features: int, out_features: int, scheme: str
    ) -> Mapping[str, Initializer]:
        reading, writing = 1.0 / in_features, 1.0 / (3.0 * self.rank)
        if checked_scheme(scheme) == "paper":
            # as the paper's dense experts, which have no common part
            return {
                "input": Initializer(sqrt(reading)),
                "output": Initializer(linear_std(self.rank)),
            }
        # two factors set experts apart, whatever the number of levels
        share, levels = noise_share(2), len(experts)
        return {
            "input": apart(reading, share, levels),
            "output": apart(writing, share, levels),
        }

    def upcycled_factors(
        self,
        experts: tuple[int, ...],
        in_features: int,
        table: Array,
        split: Split,
        backend: Backend,
    ) -> dict[str, Array]:
        """As in the base class: the same product for every expert."""
        left, right = split(self.rank)
        sides = {"input": left, "output": backend.permute(right, (1, 0))}
        found = {}
        for name, side in sides.items():
            one = backend.reshape(side, (side.shape[0], *(1 for _ in experts), self.rank))
            shape = (side.shape[0], *experts, self.rank)
            found[name] = backend.namespace.broadcast_to(one, shape)
        return found
