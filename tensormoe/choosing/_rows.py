"""A row for each factorization: what a budget buys, and its figures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tensormoe._config import BlockConfig, LayerConfig
from tensormoe._resolve import Options
from tensormoe._spec import LayerSpec
from tensormoe.choosing._request import Request
from tensormoe.errors import BudgetError, TensormoeError
from tensormoe.factorizations import resolve_factorization
from tensormoe.planning import Cost, CutLayer, compare_legs
from tensormoe.selection import (
    RankChoice,
    rank_front,
    select_block,
    select_rank,
)

Rank = int | tuple[int, ...] | None
Config = LayerConfig | BlockConfig


@dataclass(frozen=True)
class Row:
    """A layer in figures.

    Args:
        name: of the factorization, or of what it is compared with.
        cost: of one call; None where nothing fits.
        time: predicted seconds of it.
        config: the layer or block; None for what is no mixture of ours, or where nothing fits.
        expert_rank: of one expert's matrix, the smaller of a block's two; None without experts.
        expert_span: dimension of the space that experts span, likewise.
        error: why there are no figures.
        note: what the name leaves open.
        legs: along which the layer can be cut over the devices, the fastest first.
    """

    name: str
    cost: Cost | None = None
    time: float | None = None
    config: Config | None = None
    expert_rank: int | None = None
    expert_span: int | None = None
    error: TensormoeError | None = None
    note: str = ""
    legs: tuple[CutLayer, ...] = field(default=(), repr=False)

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """Of the layer, or of both layers."""
        if isinstance(self.config, BlockConfig):
            return self.config.first.spec, self.config.second.spec
        return () if self.config is None else (self.config.spec,)

    @property
    def ranks(self) -> tuple[Rank, ...]:
        """One rank for each layer, as factorizations take them."""
        return tuple(spec.factorization.rank for spec in self.specs)


def row(request: Request, name: str) -> Row:
    """The layer that a budget buys, or that a rank makes."""
    try:
        config = _config(request, name)
    except BudgetError as error:
        if not error.needed:
            raise
        return Row(name, error=error)
    return _of_config(request, name, config)


def fronts(request: Request, name: str) -> tuple[RankChoice, ...]:
    """The ranks that no other beats in both figures; of a single layer with inputs alone."""
    if request.kind != "layer":
        return ()
    try:
        return rank_front(
            name,
            *request.sizes,
            budget=request.budget,
            bias=request.bias,
            bonds=request.bonds.get(name),
            gate=request.gate,
        )
    except BudgetError as error:
        if not error.needed:
            raise
        return ()


def _config(request: Request, name: str) -> Config:
    gate, bias, experts = request.gate, request.bias, request.experts
    fixed = request.rank if name == request.selected else None
    if request.is_block:
        sizes = request.in_features, request.hidden_features, request.out_features
        gated = request.kind == "gated"
        kinds: Any = name
        if fixed is None:
            first, second = select_block(
                name,
                *sizes,
                experts,
                budget=request.budget,
                bias=bias,
                objective=request.objective,
                gate=gate,
                gated=gated,
            )
            kinds = first.factorization, second.factorization
        options = Options(experts, kinds, fixed, bias=bias, gate=gate)
        return options.block(*sizes, "silu" if gated else "gelu", gated=gated)
    indexed = request.kind == "embedding"
    rank = fixed
    if rank is None:
        rank = select_rank(
            name,
            *request.sizes,
            budget=request.budget,
            bias=bias,
            objective=request.objective,
            bonds=request.bonds.get(name),
            gate=gate,
            indexed_input=indexed,
        )
    spec = LayerSpec(*request.sizes, resolve_factorization(name, rank), bias)
    return LayerConfig(spec, gate, indexed)


def _of_config(request: Request, name: str, config: Config) -> Row:
    cost = config.cost(request.batch, itemsize=request.itemsize, training=request.training)
    found = Row(name, cost, request.device.time(cost), config)
    specs = found.specs
    found = replace(
        found,
        expert_rank=min(spec.expert_rank for spec in specs),
        expert_span=min(spec.expert_span for spec in specs),
    )
    if request.devices == 1 or request.kind != "layer":
        return found
    try:
        legs = compare_legs(
            specs[0].network,
            request.devices,
            batch=request.batch,
            training=request.training,
            itemsize=request.itemsize,
            roofline=request.device,
        )
    except TensormoeError as error:
        return replace(found, note=str(error))
    return replace(found, legs=legs)
