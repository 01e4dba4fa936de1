"""A base and deltas: experts as one matrix of full rank and products of low rank on top of it."""

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
)
from tensormoe.factorizations._initialization import Initializer
from tensormoe.factorizations._network import INPUT, OUTPUT, Factor, Leg, Network, expert_leg

_DELTA = 1


@dataclass(frozen=True)
class BaseDelta(Factorization):
    """𝒲[n] = B + U_n V_n, one matrix B of all experts and a product of rank r for each.

    This is D²-MoE (Gu et al. 2025, arXiv 2502.17298) without its pruning of the base. The network
    is a sum of two: what the experts have in common is computed once an input, times the sum of its
    coefficients, whatever they sum to.

    I·O + N·r·(I + O) parameters; with E levels, N = ΠN_e. Expert rank min(I, O) and expert span
    min(N, I·O) whatever r is, so that :func:`tensormoe.select_rank` takes the largest. A bias has a
    row in both terms. Experts cannot be scaled one by one, as they share B.

    Args:
        rank: r, the rank of an expert's difference from the base.

    Raises:
        RankError: ``rank`` is not one positive integer.

    >>> from tensormoe import LayerSpec
    >>> spec = LayerSpec(2048, 768, experts=64, factorization=BaseDelta(128), bias=False)
    >>> spec.expert_rank, spec.num_parameters == 2048 * 768 + 64 * 128 * (2048 + 768)
    (768, True)
    """

    rank: int
    name: ClassVar[str] = "base_delta"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", checked_rank(self.rank, single=True))

    def rank_pattern(self, levels: int) -> tuple[str, ...]:
        return ("R",)

    def with_rank(self, rank: tuple[int, ...]) -> BaseDelta:
        if len(rank) != 1:
            raise RankError(f"rank must have one bond for {self.name}; got {len(rank)}: {rank!r}.")
        return type(self)(*rank)

    def bonds(self, levels: int) -> tuple[int, ...]:
        return (self.rank,)

    def factors(self, levels: int) -> tuple[Factor, ...]:
        """The factors where I ≥ O; :meth:`network` has those for any sizes."""
        return _factors(levels, self._apart(1, 1))

    def network(
        self, experts: tuple[int, ...], in_features: int, out_features: int, bias: bool
    ) -> Network:
        factors = _factors(len(experts), self._apart(in_features, out_features))
        return self._joined(factors, experts, in_features, out_features, bias)

    def bond_sizes(self, experts: tuple[int, ...], out_features: int) -> Mapping[Leg, int]:
        return {"r": self.rank}

    def initializers(
        self, experts: tuple[int, ...], in_features: int, out_features: int, scheme: str
    ) -> Mapping[str, Initializer]:
        # half of the variance is the base's, which all experts share; the scheme of the paper's
        # dense experts has no common part, so there each term starts as a layer of its own
        half = 1.0 if checked_scheme(scheme) == "paper" else sqrt(0.5)
        return {
            "base": Initializer(half * linear_std(in_features)),
            "input": Initializer(1.0 / sqrt(in_features)),
            "output": Initializer(half * linear_std(self.rank)),
        }

    def upcycled_factors(
        self,
        experts: tuple[int, ...],
        in_features: int,
        table: Array,
        split: Split,
        backend: Backend,
    ) -> dict[str, Array]:
        """As in the base class: the base is the matrix, and the deltas are zero on one side."""
        xp, inner = backend.namespace, self.rank
        apart = self._apart(in_features, table.shape[1])
        left, right = split(inner)
        other = (
            backend.permute(right, (1, 0)) if apart[0] == INPUT else _alive(left, in_features, xp)
        )
        if len(apart) == 2:
            wide = backend.reshape(other, (-1, *(1 for _ in experts), inner))
            other = xp.broadcast_to(wide, (other.shape[0], *experts, inner))
        shape = (table.shape[0 if apart[0] == INPUT else 1], *experts, inner)
        zero = xp.zeros(shape, dtype=table.dtype, device=device_of(table))
        pair = (zero, other) if apart[0] == INPUT else (other, zero)
        return {"base": table, "input": pair[0], "output": pair[1]}

    def expert_noise(
        self, network: Network, factors: Mapping[str, Array], backend: Backend
    ) -> Mapping[str, Array | float]:
        """For the zeros that :meth:`upcycled_factors` leaves, in the size of the base."""
        xp, bias = backend.namespace, bool(network.biases)
        own, *others = self._apart(network.sizes[INPUT], network.sizes[OUTPUT])
        index = (slice(None), *(0 for _ in network.expert_legs if others))
        rows = network.sizes[own]
        if own == INPUT:
            rows += bias
            met = [factors["output"][index]]
        else:
            met = [factors["input"], *(factors[name] for name in ("bias_1",) if bias)]
        base = [factors[name] for name in (("base", "bias") if bias else ("base",))]
        std = _norm(base, xp) / (sqrt(rows) * _norm(met, xp))
        names = ("input", "bias_1") if own == INPUT and bias else (_NAMES[own],)
        return dict.fromkeys(names, std)

    def _apart(self, in_features: int, out_features: int) -> tuple[Leg, ...]:
        """The sides on which every expert's delta has an array of its own."""
        return INPUT, OUTPUT


@dataclass(frozen=True)
class SharedDelta(BaseDelta):
    """𝒲[n] = B + V U_n, as :class:`BaseDelta` with one side of the deltas shared by all experts.

    This is D²-MoE's variant with a shared V: all deltas read the same r directions of the input.
    The shared side is the larger one, so that what is stored once an expert is small; where I < O,
    the deltas share the directions in which they write: 𝒲[n] = B + U_n V.

    I·O + r·max(I, O) + N·r·min(I, O) parameters. Expert rank min(I, O), expert span
    min(N, I·O, 1 + r·min(I, O)).

    Args:
        rank: r, the rank of an expert's difference from the base.

    Raises:
        RankError: ``rank`` is not one positive integer.

    >>> from tensormoe import LayerSpec
    >>> spec = LayerSpec(2048, 768, experts=64, factorization=SharedDelta(128), bias=False)
    >>> spec.expert_rank, spec.num_parameters == 2048 * 768 + 128 * (2048 + 64 * 768)
    (768, True)
    """

    name: ClassVar[str] = "shared_delta"

    def _apart(self, in_features: int, out_features: int) -> tuple[Leg, ...]:
        return (OUTPUT,) if in_features >= out_features else (INPUT,)


_NAMES = {INPUT: "input", OUTPUT: "output"}


def _factors(levels: int, apart: tuple[Leg, ...]) -> tuple[Factor, ...]:
    experts = tuple(expert_leg(level) for level in range(levels))
    # the experts behind the mode: their sum is one matrix product then
    deltas = tuple(
        Factor(name, (mode, *(experts if mode in apart else ()), "r"), _DELTA)
        for mode, name in _NAMES.items()
    )
    return (Factor("base", (INPUT, OUTPUT)), *deltas)


def _alive(left: Array, in_features: int, xp: Any) -> Array:
    """The matrix with ones along the diagonal, a row for the bias aside, in empty columns."""
    place, column = (xp.arange(size, device=device_of(left)) for size in left.shape)
    diagonal = place[:, None] == column[None, :] % in_features
    dead = xp.sum(xp.abs(left), axis=0, keepdims=True) == 0
    return xp.where(dead & diagonal, xp.ones_like(left), left)


def _norm(arrays: list[Array], xp: Any) -> float:
    """The Frobenius norm of arrays together; squares of tiny or huge entries stay in range."""
    top = max(float(xp.max(xp.abs(array))) for array in arrays)
    if top == 0.0:
        return 0.0
    return top * sqrt(sum(float(xp.sum((array / top) ** 2)) for array in arrays))
