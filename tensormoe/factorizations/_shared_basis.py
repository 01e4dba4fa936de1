"""Shared basis: experts that are products of a mixture of shared matrices and one of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

from tensormoe.backend import Array, Backend, device_of
from tensormoe.factorizations._base import (
    Factorization,
    Split,
    checked_rank,
    checked_scheme,
    linear_std,
    ones_like_table,
    spread_rank,
)
from tensormoe.factorizations._initialization import Initializer, apart, noise_share
from tensormoe.factorizations._network import INPUT, OUTPUT, Factor, Leg, Network, expert_leg


@dataclass(frozen=True)
class SharedBasis(Factorization):
    """𝒲[n] = (Σ_j α[n, j] B_j) A_n, with J matrices B_j shared by all experts and A_n its own.

    This is MoBE (Chen et al. 2025, arXiv 2508.05257) without its inner activation, which keeps
    experts linear. The shared matrices B_j (I, r) are on the larger side, so that those that are
    stored once an expert, A_n (r, O), are small; where I < O, the order of the product turns round:
    𝒲[n] = A_n Σ_j α[n, j] B_j with A_n (I, r) and B_j (r, O).

    N·r·min(I, O) + J·r·max(I, O) + NJ parameters; with E levels, N = ΠN_e. Expert rank
    min(r, I, O), expert span min(N, I·O, J·r·min(I, O)), which is N nearly always: with J = 1,
    experts differ already, but all of them read (or write) the same r-dimensional space; J of them
    make that up to J·r dimensions. Neither figure tells, so that :func:`tensormoe.select_rank`
    takes J = 1 unless ``bonds`` fix it, or fix r instead.

    Args:
        rank: (J, r), the number of shared matrices and the inner size of the product. The paper
            has r = min(I, O) and J < N. One integer for both alike.

    Raises:
        RankError: an entry is not a positive integer, or there are not two.

    >>> from tensormoe import LayerSpec
    >>> spec = LayerSpec(2048, 768, experts=128, factorization=SharedBasis((16, 768)), bias=False)
    >>> spec.expert_rank, spec.num_parameters / (128 * 2048 * 768)
    (768, 0.500010172526...)
    """

    rank: int | tuple[int, ...]
    name: ClassVar[str] = "shared_basis"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", checked_rank(self.rank, single=False))

    def rank_pattern(self, levels: int) -> tuple[str, ...]:
        return ("a", "s")

    def with_rank(self, rank: tuple[int, ...]) -> SharedBasis:
        return SharedBasis(rank)

    def bonds(self, levels: int) -> tuple[int, ...]:
        return spread_rank(self.rank, 2, "the shared matrices and the size inside the product")

    def factors(self, levels: int) -> tuple[Factor, ...]:
        """The factors where I ≥ O; :meth:`network` has those for any sizes."""
        return _factors(levels, INPUT, OUTPUT)

    def network(
        self, experts: tuple[int, ...], in_features: int, out_features: int, bias: bool
    ) -> Network:
        basis, own = (INPUT, OUTPUT) if in_features >= out_features else (OUTPUT, INPUT)
        factors = _factors(len(experts), basis, own)
        return self._joined(factors, experts, in_features, out_features, bias)

    def bond_sizes(self, experts: tuple[int, ...], out_features: int) -> Mapping[Leg, int]:
        return dict(zip(("j", "r"), self.bonds(len(experts)), strict=True))

    def initializers(
        self, experts: tuple[int, ...], in_features: int, out_features: int, scheme: str
    ) -> Mapping[str, Initializer]:
        levels = len(experts)
        bases, inner = self.bonds(levels)
        if checked_scheme(scheme) == "paper":
            # the scheme of the paper's CP, with the experts' own matrices as a linear layer's
            return {
                "mixing": Initializer(1.0, "normal", "one"),
                "input": Initializer(linear_std(in_features)),
                "output": Initializer(linear_std(bases * inner)),
            }
        # two factors set experts apart, whatever the number of levels
        share = noise_share(2)
        wide = in_features >= out_features
        reading = 1.0 / in_features
        writing = 1.0 / (3.0 * bases * inner * (1.0 + share))
        return {
            "mixing": Initializer(sqrt(share), "normal", "one"),
            "input": Initializer(sqrt(reading)) if wide else apart(reading, share, levels),
            "output": apart(writing, share, levels) if wide else Initializer(sqrt(writing)),
        }

    def upcycled_factors(
        self,
        experts: tuple[int, ...],
        in_features: int,
        table: Array,
        split: Split,
        backend: Backend,
    ) -> dict[str, Array]:
        """As in the base class; every shared matrix owns a part of the r components."""
        xp = backend.namespace
        bases, inner = self.bonds(len(experts))
        left, right = split(inner)
        right = backend.permute(right, (1, 0))
        owned = _owned(bases, inner, table, xp)
        wide = in_features >= table.shape[1]
        basis, own = (left, right) if wide else (right, left)
        basis = basis[:, None, :] * owned[None, :, :]
        ones = (1,) * len(experts)
        own = backend.reshape(own, (own.shape[0], *ones, inner))
        own = xp.broadcast_to(own, (own.shape[0], *experts, inner))
        return {
            "mixing": ones_like_table(table, (*experts, bases), backend),
            "input": basis if wide else own,
            "output": own if wide else basis,
        }


def _factors(levels: int, basis: Leg, own: Leg) -> tuple[Factor, ...]:
    experts = tuple(expert_leg(level) for level in range(levels))
    # the experts behind the mode: their sum is one matrix product then
    legs = {basis: (basis, "j", "r"), own: (own, *experts, "r")}
    return (
        Factor("mixing", (*experts, "j")),
        Factor("input", legs[INPUT]),
        Factor("output", legs[OUTPUT]),
    )


def _owned(bases: int, inner: int, like: Array, xp: Any) -> Array:
    """(J, r) weights that sum to one over J, no row of them all zero or equal to another."""
    place, component = (xp.arange(size, device=device_of(like)) for size in (bases, inner))
    period = min(bases, inner)
    owner = place[:, None] % period == component[None, :] % period
    # where several matrices own a component, they differ in their shares of it
    weights = xp.astype(owner, like.dtype) * xp.astype(1 + place, like.dtype)[:, None]
    return weights / xp.sum(weights, axis=0, keepdims=True)
