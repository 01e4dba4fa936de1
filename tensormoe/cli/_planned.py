"""The plan that ``tensormoe plan`` is asked for: of a layer, or of both layers of a block."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from tensormoe._config import BlockConfig, LayerConfig
from tensormoe.choosing import Request
from tensormoe.choosing._rows import Config, chosen, made
from tensormoe.choosing._words import parse_bytes, parse_size
from tensormoe.cli._asked import parse_layer
from tensormoe.cli._devices import Cuts, cut_layers
from tensormoe.cli._settings import GIVEN, option_name
from tensormoe.errors import PlanError, RankError
from tensormoe.factorizations import rank_pattern
from tensormoe.gates import Gate
from tensormoe.planning import Cost, Plan, Routing, block_cost, gate_cost, plan_layer


@dataclass(frozen=True)
class Planned:
    """A layer or block with its plans and its cost.

    Args:
        request: that it answers.
        config: the whole layer or block, also where it is cut.
        plans: by the name of the layer: one, or those of the first and the second.
        cost: of a call.
        top_k: coefficients that are given by index, if any.
        cuts: the legs that a layer can be cut along, and the one that is planned.
    """

    request: Request
    config: Config
    plans: Mapping[str, Plan]
    cost: Cost
    top_k: int | None
    cuts: Cuts | None

    @property
    def layers(self) -> Mapping[str, LayerConfig]:
        """The layers by name."""
        return layers_of(self.config)

    def gate_of(self, name: str) -> Gate | None:
        """The gate that runs with a layer."""
        return self.layers[name].gate

    @property
    def gate_cost(self) -> Cost:
        """The cost of the gate alone."""
        asked = self.request
        return gate_cost(
            asked.gate,
            asked.in_features,
            asked.experts,
            asked.batch,
            training=asked.training,
            itemsize=asked.itemsize,
        )


def layers_of(config: Config) -> Mapping[str, LayerConfig]:
    """The layers of a configuration by name."""
    if isinstance(config, BlockConfig):
        return {"first": config.first, "second": config.second}
    return {"layer": config}


def plan_asked(arguments: argparse.Namespace) -> Planned:
    """The plan that the words of a command ask for.

    Raises:
        TensormoeError: words that cannot be, or that exclude one another.
    """
    top_k = None
    if arguments.top_k is not None:
        top_k = parse_size(arguments.top_k, option_name(arguments, "top_k"))
        if arguments.gate is None:
            arguments.gate = "none"
    asked = _request(arguments)
    limit = parse_bytes(arguments.memory_limit, option_name(arguments, "memory_limit"))
    _check(asked, arguments, limit)
    config = _config(asked, arguments)
    if isinstance(config, BlockConfig):
        return _block(asked, config, top_k)
    routing = Routing(top_k, config.indexed_input)
    cuts = cut_layers(arguments, config.spec, asked, routing)
    plan = plan_layer(
        config.spec.network if cuts is None else cuts[1].network,
        asked.batch,
        routing,
        prepared=arguments.prepared,
        memory_limit=limit,
        gate=config.gate,
        itemsize=asked.itemsize,
        title=repr(config.spec.factorization),
    )
    cost = plan.cost(config.gate, training=asked.training, itemsize=asked.itemsize)
    return Planned(asked, config, {"layer": plan}, cost, top_k, cuts)


def _request(arguments: argparse.Namespace) -> Request:
    if arguments.rank is not None and arguments.budget is not None:
        sources = [arguments.sources[name] for name in ("rank", "budget")]
        if (sources[0] == GIVEN) == (sources[1] == GIVEN):
            raise RankError(
                f"--rank and --budget exclude one another; got {arguments.rank!r} and "
                f"{arguments.budget!r}. Drop one."
            )
        # what the command line says wins over a file's
        setattr(arguments, "budget" if sources[0] == GIVEN else "rank", None)
    # a name, and no list of them
    names = [arguments.factorization.replace("-", "_")]
    return parse_layer(arguments, factorizations=names, rank=arguments.rank)


def _check(asked: Request, arguments: argparse.Namespace, limit: int | None) -> None:
    """Refuse options that exclude one another."""
    if limit is not None and asked.training:
        raise PlanError(
            "--memory-limit is for forward calls, since gradients need the whole batch; got it "
            "with --training. Drop one, or plan a smaller --batch."
        )
    if not asked.is_block:
        return
    for name in ("memory_limit", "prepared", "leg"):
        if getattr(arguments, name):
            why = "; blocks are cut along their hidden leg" if name == "leg" else ""
            raise PlanError(
                f"--{name.replace('_', '-')} is for single layers{why}; got it with --kind "
                f"{asked.kind}. Drop one of them."
            )


def _config(asked: Request, arguments: argparse.Namespace) -> Config:
    (name,) = asked.names
    free = not rank_pattern(name, len(asked.experts))
    if free and asked.rank is None and arguments.budget is None:
        # there is nothing to choose, and no limit that was asked for
        return made(asked, name)
    return chosen(asked, name)


def _block(asked: Request, config: BlockConfig, top_k: int | None) -> Planned:
    part = config.shard(asked.devices) if asked.devices > 1 else config
    routing = Routing(top_k)
    plans = {
        name: plan_layer(
            layer.spec.network,
            asked.batch,
            routing,
            itemsize=asked.itemsize,
            title=repr(layers_of(config)[name].spec.factorization),
        )
        for name, layer in layers_of(part).items()
    }
    cost = block_cost(
        plans["first"],
        plans["second"],
        config.first.gate,
        gated=config.gated,
        training=asked.training,
        itemsize=asked.itemsize,
    )
    return Planned(asked, config, plans, cost, top_k, None)
