"""Rows to compare with: the layers that are replaced, and other mixtures of as many experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt, prod
from typing import Any

from tensormoe._config import BlockConfig, LayerConfig
from tensormoe._resolve import Options
from tensormoe._spec import LayerSpec
from tensormoe.choosing._request import Request
from tensormoe.choosing._rows import Row
from tensormoe.errors import TensormoeError
from tensormoe.factorizations import Dense
from tensormoe.mixtures import (
    MixtureConfig,
    cartesian_config,
    product_config,
    soft_config,
    sparse_config,
)
from tensormoe.planning import Cost
from tensormoe.selection import linear_cost, mlp_cost, sparse_moe_cost

_NEURONS = 8
"""Experts of one neuron that product keys pick, unless a level has fewer."""

Compared = Cost | LayerConfig | BlockConfig | MixtureConfig
Others = Mapping[str, tuple[str, Callable[[], Compared]]]


def compared(request: Request) -> tuple[Row, ...]:
    """The layers that mixtures replace, and other mixtures with as many experts."""
    others = {"embedding": _embeddings, "layer": _layers}.get(request.kind, _blocks)(request)
    return tuple(_row(request, name, *other) for name, other in others.items())


def _row(request: Request, name: str, note: str, make: Callable[[], Compared]) -> Row:
    try:
        made = make()
    except TensormoeError as error:
        return Row(name, error=error, note=note)
    cost = made if isinstance(made, Cost) else made.cost(request.batch, **_call(request))
    rank, span = _capacity(request, name)
    return Row(name, cost, request.device.time(cost), None, rank, span, note=note)


def _call(request: Request) -> dict[str, Any]:
    return {"training": request.training, "itemsize": request.itemsize}


def _capacity(request: Request, name: str) -> tuple[int | None, int | None]:
    """Expert rank and expert span of a row, where its experts are matrices of full rank."""
    if request.kind != "layer":
        return None, None
    rows, columns, experts = request.sizes
    full, entries = min(rows, columns), rows * columns
    if name == "linear":
        return full, 1
    return (full, min(prod(experts), entries)) if name.endswith("MoE") else (None, None)


def _embeddings(request: Request) -> Others:
    rows, columns, experts = request.sizes

    def dense(count: int | tuple[int, ...]) -> LayerConfig:
        return LayerConfig(LayerSpec(rows, columns, count, Dense(), False), None, True)

    return {
        "embedding": ("one table", lambda: dense(1)),
        "dense MoE": ("a table for each expert", lambda: dense(experts)),
    }


def _layers(request: Request) -> Others:
    rows, columns, experts = request.sizes
    batch, bias, kept, call = request.batch, request.bias, request.top_k, _call(request)
    count = prod(experts)
    spec = LayerSpec(rows, columns, experts, Dense(), bias)
    hidden = request.hidden_features
    return {
        "linear": ("", lambda: linear_cost(rows, columns, batch, bias=bias, **call)),
        "MLP": (
            f"{hidden:,} hidden features",
            lambda: mlp_cost(rows, hidden, columns, batch, bias=bias, **call),
        ),
        "dense MoE": ("every input runs every expert", lambda: LayerConfig(spec, request.gate)),
        "sparse MoE": (
            _runs(kept, "expert"),
            lambda: sparse_moe_cost(rows, columns, experts, kept, batch, bias=bias, **call),
        ),
        "soft MoE": (
            "one slot per expert",
            lambda: soft_config(rows, None, columns, experts=count, kind="linear", bias=bias),
        ),
    }


def _blocks(request: Request) -> Others:
    sizes = rows, hidden, columns = (
        request.in_features,
        request.hidden_features,
        request.out_features,
    )
    batch, bias, gated = request.batch, request.bias, request.kind == "gated"
    count, root = prod(request.experts), isqrt(prod(request.experts))
    act = "silu" if gated else "gelu"
    options: dict[str, Any] = {"kind": "swiglu" if gated else "mlp", "bias": bias}
    kept, halves = request.top_k, min(request.top_k, root)
    levels = _levels(request.experts)
    neurons = min(_NEURONS, *levels)

    def dense(experts: int | tuple[int, ...], gate: Any) -> BlockConfig:
        return Options(experts, "dense", bias=bias, gate=gate).block(*sizes, act, gated=gated)

    replaced: Callable[[], Compared] = lambda: mlp_cost(  # noqa: E731
        *sizes, batch, bias=bias, **_call(request)
    )
    return {
        "gated MLP" if gated else "MLP": (
            "",
            (lambda: dense(1, None)) if gated else replaced,
        ),
        "dense MoE": (
            "every input runs every expert",
            lambda: dense(request.experts, request.gate),
        ),
        "sparse MoE": (
            _runs(kept, "expert"),
            lambda: sparse_config(*sizes, experts=count, top_k=kept, **options),
        ),
        "soft MoE": ("one slot per expert", lambda: soft_config(*sizes, experts=count, **options)),
        "Cartesian MoE": (
            f"{root} × {root} compositions, {_runs(halves, 'sub-expert')} of each half",
            lambda: cartesian_config(
                rows, max(hidden // 2, 1), columns, experts=root, top_k=halves, **options
            ),
        ),
        "product keys": (
            f"{levels[0]} × {levels[1]} experts of one neuron, {_runs(neurons, 'expert')}",
            lambda: product_config(rows, 1, columns, experts=levels, top_k=neurons),
        ),
    }


def _runs(kept: int, what: str) -> str:
    return f"an input runs {kept} {what}{'s' if kept > 1 else ''}"


def _levels(experts: tuple[int, ...]) -> tuple[int, int]:
    """Two levels of about as many experts, the nearest to a square that divides."""
    if len(experts) == 2:
        return experts[0], experts[1]
    count = prod(experts)
    root = isqrt(count)
    while count % root:
        root -= 1
    return root, count // root
