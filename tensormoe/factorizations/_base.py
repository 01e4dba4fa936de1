"""Base class of factorizations, and what follows from a network alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any, ClassVar

from tensormoe._validation import choice, positive_ints
from tensormoe.backend import Array, Backend, device_of
from tensormoe.errors import LayoutError, RankError, SpecError
from tensormoe.factorizations._experts import expert_carriers
from tensormoe.factorizations._initialization import Initializer
from tensormoe.factorizations._network import (
    INPUT,
    OUTPUT,
    Factor,
    Leg,
    Network,
    expert_leg,
)

Split = Callable[[int], "tuple[Array, Array]"]
"""From an inner size K to (rows, K) and (K, out): factors of the best product of that size."""

INITIALIZATIONS = ("variance", "paper")
"""Names of the schemes that initial values are drawn by."""


class Factorization(ABC):
    """Storage of the expert tensor 𝒲 (experts…, in, out): a network of factors.

    A factorization is a frozen value without arrays. A new one is a subclass in one new file that
    names its factors and legs, says how its factors start, and how TensorLy lays them out. As a
    rule it is a frozen dataclass with a field ``rank``: values are made by ``kind(rank=…)``, where
    one integer stands for all bonds, or by ``kind()`` where there is no rank to choose.
    :func:`tensormoe.register_factorization` lets its name stand for it.
    """

    name: ClassVar[str]
    """The name under which users ask for it."""

    rank: Any
    """The bond sizes, one integer or one per bond; None where there are none to choose."""

    @abstractmethod
    def rank_pattern(self, levels: int) -> tuple[str, ...]:
        """The bonds by symbol, for ``levels`` levels: bonds of one symbol vary together.

        Rank selection searches over one size per symbol. It is empty, at any number of levels,
        where there is no rank to choose.
        """

    @abstractmethod
    def with_rank(self, rank: tuple[int, ...]) -> Factorization:
        """The same factorization with other bond sizes, one per bond."""

    @abstractmethod
    def bonds(self, levels: int) -> tuple[int, ...]:
        """The bond sizes, one per bond, for ``levels`` levels; checks the number given."""

    @abstractmethod
    def factors(self, levels: int) -> tuple[Factor, ...]:
        """The factors, mode first, then bonds."""

    @abstractmethod
    def bond_sizes(self, experts: tuple[int, ...], out_features: int) -> Mapping[Leg, int]:
        """The size of every bond leg."""

    @abstractmethod
    def initializers(
        self, experts: tuple[int, ...], in_features: int, out_features: int, scheme: str
    ) -> Mapping[str, Initializer]:
        """Initial values of each factor under the scheme ``"variance"`` or ``"paper"``."""

    def to_tensorly(self, factors: Mapping[str, Array], xp: Any) -> Any:
        """The factors, bias aside, in the layout of TensorLy's decomposition of that name.

        Raises:
            LayoutError: TensorLy has no such decomposition.
        """
        raise self._no_layout()

    def from_tensorly(self, decomposition: Any, xp: Any) -> dict[str, Array]:
        """The inverse of :meth:`to_tensorly`.

        Raises:
            LayoutError: TensorLy has no such decomposition.
        """
        raise self._no_layout()

    def _no_layout(self) -> LayoutError:
        return LayoutError(
            f"a decomposition must be one that TensorLy has; got {self.name}. Exchange the whole "
            "tensor instead, as a layer's materialize() gives it."
        )

    def upcycled_factors(
        self,
        experts: tuple[int, ...],
        in_features: int,
        table: Array,
        split: Split,
        backend: Backend,
    ) -> dict[str, Array]:
        """Factors with which all experts equal one matrix, or the nearest that the bonds admit.

        No bond is left dead: where a factor is zero, its neighbours are not, so that gradients
        reach every entry.

        Args:
            experts: one size per level.
            in_features: I, without a row for the bias.
            table: the matrix (in, out), and the bias as one more row if there is one.
            split: the best product of an inner size that equals ``table``; its spare columns, where
                the size is more than the matrix has singular values, add nothing.
            backend: adapter of the arrays' library.

        Returns:
            The factors by name; the bias, if any, is still the last row of the input mode.

        Raises:
            SpecError: the factorization does not say how.
        """
        raise SpecError(
            f"{self.name} does not say which factors make all experts equal. Define its "
            "upcycled_factors, or start from fresh values."
        )

    def expert_noise(
        self, network: Network, factors: Mapping[str, Array], backend: Backend
    ) -> Mapping[str, Array | float]:
        """Standard deviations of independent noise that moves experts by their own size.

        Args:
            network: of the layer.
            factors: as :meth:`upcycled_factors` makes them, with biases apart, by name.
            backend: adapter of the arrays' library.

        Returns:
            For every array that noise is to be added to, a number or one for every entry.
        """
        legs = {factor.name: {*factor.legs} for factor in network.all_factors}
        rows = {factor.name for factor in network.biases}
        found: dict[str, Array | float] = {}
        for level in range(len(network.expert_legs)):
            for name in expert_carriers(network, level):
                # experts stored as they are: their entries move by a share of themselves
                whole = name in rows or legs[name] & {INPUT, OUTPUT}
                spread = sqrt(self.expert_variance(len(network.expert_legs)))
                found[name] = factors[name] if whole else spread
        return found

    def expert_variance(self, levels: int) -> float:
        """Variance of independent noise on an expert factor that moves experts by their own size.

        Expert factors as :meth:`upcycled_factors` makes them are meant; ones for most networks.
        """
        return 1.0

    def network(
        self, experts: tuple[int, ...], in_features: int, out_features: int, bias: bool
    ) -> Network:
        """The network for a layer of these sizes."""
        factors = self.factors(len(experts))
        return self._joined(factors, experts, in_features, out_features, bias)

    def _joined(
        self,
        factors: tuple[Factor, ...],
        experts: tuple[int, ...],
        in_features: int,
        out_features: int,
        bias: bool,
    ) -> Network:
        sizes = {expert_leg(level): size for level, size in enumerate(experts)}
        sizes |= {INPUT: in_features, OUTPUT: out_features}
        sizes |= self.bond_sizes(experts, out_features)
        carriers = [factor for factor in factors if INPUT in factor.legs] if bias else []
        rows = tuple(
            Factor(
                f"bias_{carrier.term}" if carrier.term else "bias",
                tuple(leg for leg in carrier.legs if leg != INPUT),
                carrier.term,
            )
            for carrier in carriers
        )
        return Network(factors, tuple(sizes.items()), rows)


def checked_scheme(scheme: str) -> str:
    """``scheme`` if it names an initialisation."""
    return choice(scheme, INITIALIZATIONS, "init", SpecError)


def checked_rank(rank: Any, single: bool) -> int | tuple[int, ...]:
    """A rank of positive integers, as one integer where ``single`` or given so."""
    sizes = positive_ints(rank, "rank", "bond", RankError)
    if single and len(sizes) != 1:
        raise RankError(f"rank must be one positive integer; got {rank!r}.")
    return sizes[0] if single or isinstance(rank, int) else sizes


def spread_rank(rank: int | tuple[int, ...], count: int, meaning: str) -> tuple[int, ...]:
    """``rank`` with one entry for each of ``count`` bonds."""
    if isinstance(rank, int):
        return (rank,) * count
    if len(rank) != count:
        raise RankError(
            f"rank must have {count} bonds, {meaning}; got {len(rank)}: {rank!r}. "
            "Give one size per bond, or one integer for all."
        )
    return rank


def linear_std(in_features: int) -> float:
    """Standard deviation of a weight of ``torch.nn.Linear``: uniform on ±1/√in."""
    return 1.0 / sqrt(3.0 * in_features)


def mode_names(levels: int) -> tuple[str, ...]:
    """Names of the factors that carry a mode, in the order of 𝒲's modes."""
    return (*(f"expert_{level}" for level in range(levels)), "input", "output")


def ones_like_table(table: Array, shape: tuple[int, ...], backend: Backend) -> Array:
    """Ones of a shape, with the dtype and on the device of ``table``."""
    return backend.namespace.ones(shape, dtype=table.dtype, device=device_of(table))


def tiled_columns(array: Array, count: int, xp: Any) -> Array:
    """The columns of a matrix again and again, ``count`` in all."""
    times = -(-count // array.shape[1])
    return array if count == array.shape[1] else xp.concat([array] * times, axis=1)[:, :count]
