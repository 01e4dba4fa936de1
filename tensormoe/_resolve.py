"""Layers and blocks from the arguments that every framework's constructors share."""

from __future__ import annotations

from dataclasses import dataclass

from tensormoe._config import BlockConfig, LayerConfig
from tensormoe._spec import LayerSpec
from tensormoe._validation import flag, is_number, positive_int, positive_ints
from tensormoe.errors import RankError, SpecError
from tensormoe.factorizations import (
    Factorization,
    FactorizationLike,
    rank_pattern,
    resolve_factorization,
)
from tensormoe.gates import Gate
from tensormoe.selection import Budget, select_block, select_rank


@dataclass(frozen=True)
class Options:
    """Arguments that all constructors of layers and blocks share.

    Args:
        experts: N, or one size per level of hierarchy.
        factorization: a value such as ``CP(rank=64)``, or its name; for blocks, a pair as well.
        rank: bond sizes, with a name; for each of the two layers of a block.
        budget: upper limits instead, the gate included. Without rank or budget, the factors get
            the parameters of the linear layer of their size (for factorizations with a rank to
            choose), and the gate comes on top.
        bias: whether every expert has a bias.
        gate: a :class:`tensormoe.Gate`, the name of its activation, or None.

    >>> Options(16, rank=8).layer(64, 10).num_parameters
    1752
    """

    experts: int | tuple[int, ...]
    factorization: FactorizationLike | tuple[FactorizationLike, FactorizationLike] = "cp"
    rank: int | tuple[int, ...] | None = None
    budget: Budget | int | str | None = None
    bias: bool = True
    gate: Gate | str | None = "entmax"

    def layer(
        self, in_features: int, out_features: int, *, indexed_input: bool = False
    ) -> LayerConfig:
        """The configuration of a layer; it is planned already.

        Raises:
            SpecError: sizes, names or options that cannot be.
            RankError: a rank that does not fit, or both a rank and a budget.
            BudgetError: an impossible budget; the message names the smallest feasible one.
        """
        if isinstance(self.factorization, tuple):
            raise SpecError(
                f"factorization must be one for a single layer; got {self.factorization!r}. Pairs "
                "are for blocks of two."
            )
        if self.budget is not None:
            self._unranked(self.factorization)
        rank = self.rank
        if not isinstance(self.factorization, Factorization) and rank is None:
            sizes = positive_ints(self.experts, "experts", "level")
            if self.budget is not None or rank_pattern(self.factorization, len(sizes)):
                rank = select_rank(
                    self.factorization,
                    in_features,
                    out_features,
                    sizes,
                    budget=self.budget,
                    bias=self.bias,
                    gate=self.gate,
                    indexed_input=indexed_input,
                )
        factorization = resolve_factorization(self.factorization, rank)
        spec = LayerSpec(in_features, out_features, self.experts, factorization, self.bias)
        config = LayerConfig(spec, self._gate(spec.experts), indexed_input)
        config.plan_ahead()
        return config

    def block(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: str | None = "gelu",
        drop: float = 0.0,
        *,
        gated: bool = False,
    ) -> BlockConfig:
        """The configuration of a block; it is planned already.

        Hidden and output size are the input's unless given; the first layer of a ``gated`` block
        has twice the hidden size as outputs. A budget covers both layers together with their gate.

        Raises:
            SpecError, RankError, BudgetError: as :meth:`layer`.
        """
        if not is_number(drop) or not 0.0 <= drop < 1.0:
            raise SpecError(f"drop must be in [0, 1); got {drop!r}. Give the share to drop.")
        hidden = in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        pair = self.factorization
        pair = pair if isinstance(pair, tuple) else (pair, pair)
        if len(pair) != 2:
            raise SpecError(
                f"factorization must be one, or one per layer; got {len(pair)}: "
                f"{self.factorization!r}."
            )
        wide = 2 * positive_int(hidden, "hidden_features") if flag(gated, "gated") else hidden
        if self.budget is not None:
            chosen = select_block(
                (self._unranked(pair[0]), self._unranked(pair[1])),
                in_features,
                hidden,
                out,
                self.experts,
                budget=self.budget,
                bias=self.bias,
                gate=self.gate,
                gated=gated,
            )
            pair = chosen[0].factorization, chosen[1].factorization
        first, second = (
            Options(self.experts, kind, self.rank, None, self.bias, gate).layer(rows, columns)
            for kind, gate, rows, columns in (
                (pair[0], self.gate, in_features, wide),
                (pair[1], None, hidden, out),
            )
        )
        return BlockConfig(first, second, act_layer, float(drop), gated)

    def _unranked(self, kind: FactorizationLike) -> str | type[Factorization]:
        """A factorization whose rank the budget chooses: refuse one that has a rank already."""
        if self.rank is None and not isinstance(kind, Factorization):
            return kind
        given = f"rank={self.rank!r}" if self.rank is not None else repr(self.factorization)
        raise RankError(
            f"rank and budget exclude one another; got {given} and budget={self.budget!r}. Drop "
            "one."
        )

    def _gate(self, experts: tuple[int, ...]) -> Gate | None:
        gate = None if self.gate is None else Gate.parse(self.gate)
        for level, count in enumerate(experts):
            if gate is not None and gate.k is not None and gate.k > count:
                raise SpecError(
                    f"k of a top-k gate must be at most the experts of each level; got {gate.k} "
                    f"for level {level} of {count}. Lower k."
                )
        return gate
