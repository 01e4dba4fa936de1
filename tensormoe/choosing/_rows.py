"""A row for each factorization: what a budget buys, and its figures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tensormoe._config import BlockConfig, LayerConfig
from tensormoe._resolve import Options
from tensormoe._spec import LayerSpec
from tensormoe.choosing._request import Request
from tensormoe.errors import BudgetError, TensormoeError
from tensormoe.factorizations import Factorization, resolve_factorization
from tensormoe.planning import Cost, Routing, compare_legs
from tensormoe.selection import (
    RankChoice,
    rank_front,
    select_block,
    select_rank,
)

Rank = int | tuple[int, ...] | None
Config = LayerConfig | BlockConfig


@dataclass(frozen=True)
class Cut:
    """One device's part of a layer or block.

    Args:
        leg: that is cut: of a layer's network, or ``hidden`` of a block.
        cost: of a call on one device; of a layer without its gate, input and output whole.
        time: predicted seconds of it, communication included.
    """

    leg: str
    cost: Cost
    time: float


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
        legs: the ways to cut it over the devices, the fastest first.
    """

    name: str
    cost: Cost | None = None
    time: float | None = None
    config: Config | None = None
    expert_rank: int | None = None
    expert_span: int | None = None
    error: TensormoeError | None = None
    note: str = ""
    legs: tuple[Cut, ...] = field(default=(), repr=False)

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
        config = chosen(request, name)
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


def chosen(request: Request, name: str) -> Config:
    """The layer of the rank that is asked for, or of the best one within the budget.

    Raises:
        BudgetError: nothing fits.
    """
    if request.rank is not None and name == request.selected:
        return made(request, name, request.rank)
    common: dict[str, Any] = {
        "budget": request.budget,
        "bias": request.bias,
        "objective": request.objective,
        "gate": request.gate,
    }
    if request.is_block:
        sizes = request.in_features, request.hidden_features, request.out_features
        gated = request.kind == "gated"
        both = select_block(name, *sizes, request.experts, gated=gated, **common)
        first, second = (each.factorization for each in both)
        return made(request, (first, second))
    bonds, indexed = request.bonds.get(name), request.kind == "embedding"
    rank = select_rank(name, *request.sizes, bonds=bonds, indexed_input=indexed, **common)
    return made(request, name, rank)


def made(
    request: Request,
    factorization: str | tuple[Factorization, Factorization],
    rank: int | tuple[int, ...] | None = None,
) -> Config:
    """A layer or block of a rank, whatever it takes; of a block, one rank or two values."""
    gate, bias = request.gate, request.bias
    if request.is_block:
        sizes = request.in_features, request.hidden_features, request.out_features
        gated = request.kind == "gated"
        options = Options(request.experts, factorization, rank, bias=bias, gate=gate)
        return options.block(*sizes, "silu" if gated else "gelu", gated=gated)
    assert isinstance(factorization, str)
    spec = LayerSpec(*request.sizes, resolve_factorization(factorization, rank), bias)
    return LayerConfig(spec, gate, request.kind == "embedding")


def _of_config(request: Request, name: str, config: Config) -> Row:
    cost = config.cost(request.batch, itemsize=request.itemsize, training=request.training)
    found = Row(name, cost, request.device.time(cost), config)
    specs = found.specs
    found = replace(
        found,
        expert_rank=min(spec.expert_rank for spec in specs),
        expert_span=min(spec.expert_span for spec in specs),
    )
    if request.devices == 1:
        return found
    try:
        return replace(found, legs=_cuts(request, config))
    except TensormoeError as error:
        return replace(found, note=str(error))


def _cuts(request: Request, config: Config) -> tuple[Cut, ...]:
    call: dict[str, Any] = {"itemsize": request.itemsize, "training": request.training}
    if isinstance(config, BlockConfig):
        cost = config.shard(request.devices).cost(request.batch, **call)
        return (Cut("hidden", cost, request.device.time(cost)),)
    legs = compare_legs(
        config.spec.network,
        request.devices,
        batch=request.batch,
        routing=Routing(None, config.indexed_input),
        roofline=request.device,
        **call,
    )
    return tuple(Cut(each.leg, each.cost, each.time) for each in legs)
