"""Hadamard: experts that share one full-rank matrix and scale its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, ClassVar

from tensormoe.backend import Array, Backend, device_of
from tensormoe.errors import RankError
from tensormoe.factorizations._base import (
    Factorization,
    Split,
    checked_scheme,
    linear_std,
    mode_names,
    ones_like_table,
)
from tensormoe.factorizations._initialization import Initializer, noise_share
from tensormoe.factorizations._layouts import pair_of, weights_of
from tensormoe.factorizations._network import INPUT, OUTPUT, Factor, Leg, expert_leg


@dataclass(frozen=True)
class Hadamard(Factorization):
    """𝒲[n, i, o] = C[n, o] D[i, o] (Oldfield et al. 2025, arXiv 2505.21364, lemma 2).

    O (N + I) parameters and nothing to choose: the output mode is a hyperedge, so every expert
    D·diag(C[n]) has full rank min(I, O), whatever N. Expert span min(ΠN_e, O).

    >>> from tensormoe import LayerSpec
    >>> spec = LayerSpec(3072, 768, experts=24576, factorization=Hadamard(), bias=False)
    >>> spec.expert_rank, spec.expert_span, spec.num_parameters
    (768, 768, 21233664)
    """

    rank: None = field(default=None, init=False, repr=False)
    name: ClassVar[str] = "hadamard"

    def rank_pattern(self, levels: int) -> tuple[str, ...]:
        return ()

    def with_rank(self, rank: tuple[int, ...]) -> Hadamard:
        if rank:
            raise RankError(f"rank must be None for hadamard, which has none; got {rank!r}.")
        return self

    def bonds(self, levels: int) -> tuple[int, ...]:
        return ()

    def factors(self, levels: int) -> tuple[Factor, ...]:
        modes = (*(expert_leg(level) for level in range(levels)), INPUT)
        names = mode_names(levels)[:-1]
        return tuple(Factor(name, (mode, OUTPUT)) for name, mode in zip(names, modes, strict=True))

    def bond_sizes(self, experts: tuple[int, ...], out_features: int) -> Mapping[Leg, int]:
        return {}

    def initializers(
        self, experts: tuple[int, ...], in_features: int, out_features: int, scheme: str
    ) -> Mapping[str, Initializer]:
        levels = len(experts)
        share = noise_share(levels)
        if checked_scheme(scheme) == "paper":
            starts = {
                f"expert_{e}": Initializer(0.0 if e else 1.0, "normal", "one")
                for e in range(levels)
            }
            return starts | {"input": Initializer(linear_std(in_features))}
        starts = {f"expert_{e}": Initializer(sqrt(share), "normal", "one") for e in range(levels)}
        energy = (1.0 + share) ** levels
        return starts | {"input": Initializer(linear_std(in_features) / sqrt(energy))}

    def upcycled_factors(
        self,
        experts: tuple[int, ...],
        in_features: int,
        table: Array,
        split: Split,
        backend: Backend,
    ) -> dict[str, Array]:
        stored = {
            f"expert_{level}": ones_like_table(table, (count, table.shape[1]), backend)
            for level, count in enumerate(experts)
        }
        return stored | {"input": table}

    def to_tensorly(self, factors: Mapping[str, Array], xp: Any) -> Any:
        """(weights, factors) of ``tensorly.cp_to_tensor``: CP of rank O, output factor identity."""
        listed = [array for name, array in factors.items() if name != "bias"]
        size, like = listed[0].shape[1], listed[0]
        ones = xp.ones((size,), dtype=like.dtype, device=device_of(like))
        return ones, [*listed, xp.eye(size, dtype=like.dtype, device=device_of(like))]

    def from_tensorly(self, decomposition: Any, xp: Any) -> dict[str, Array]:
        weights, factors = pair_of(decomposition, self.name, "weights")
        names = mode_names(len(factors) - 2)[:-1]
        stored = {n: xp.asarray(a, copy=True) for n, a in zip(names, factors[:-1], strict=True)}
        last = factors[-1]
        one = xp.eye(last.shape[0], dtype=last.dtype, device=device_of(last))
        if last.ndim != 2 or last.shape[0] != last.shape[1] or bool(xp.any(last != one)):
            raise RankError(
                "the output factor of a Hadamard decomposition must be the identity; got another "
                f"of shape {tuple(last.shape)}. Use CP for a free output factor."
            )
        if weights is not None:
            stored["input"] = stored["input"] * weights_of(weights, last.shape[0], self.name)
        return stored
