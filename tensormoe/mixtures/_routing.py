"""Routing of tokens by a router that is part of a mixture."""

from __future__ import annotations

from math import sqrt

from tensormoe._mixture import OwnArray
from tensormoe.backend import Array
from tensormoe.errors import GateError
from tensormoe.functional._dtypes import widened
from tensormoe.gates import Across
from tensormoe.mixtures._parts import Parts
from tensormoe.routing import Router, Routes, choose
from tensormoe.routing._routes import next_bias


def router_arrays(router: Router, in_features: int, experts: int) -> dict[str, OwnArray]:
    """The trainable arrays of a router: a projection like that of a linear layer, and a bias."""
    span = 1.0 / sqrt(in_features)
    arrays = {"router.projection": OwnArray((in_features, experts), "uniform", span)}
    return arrays | ({"router.bias": OwnArray((experts,))} if router.bias else {})


def route_tokens(
    router: Router,
    k: int,
    parts: Parts,
    name: str,
    x: Array,
    training: bool,
    noise: Array | None,
    across: Across | None,
) -> tuple[Routes, dict[str, Array]]:
    """The experts of tokens, and the buffers that training changed.

    Args:
        router: the rule.
        k: experts per token.
        parts: arrays and buffers of the mixture.
        name: what stands before ``.projection``, ``.bias`` and ``.choice_bias``.
        x: (tokens, in).
        training: whether noise is added and the biases for the choice move.
        noise: standard normal (tokens, N), for a router with ``noise`` in training.
        across: the sum of an array over all that have tokens of the step.

    Raises:
        GateError: a router with noise in training and none given, or with ``balance`` and no
            biases.
    """
    backend, kept = parts.backend, f"{name}.choice_bias"
    noisy = training and router.noise > 0
    if noisy and noise is None:
        raise GateError(
            f"a router with noise={router.noise} needs a source of random numbers in training; got "
            "none. Pass one, a key for instance, or train a router without noise."
        )
    bias = parts.arrays.get(kept)
    if router.balance and bias is None:
        raise GateError(
            f"a router with balance={router.balance} needs its biases; got no {kept!r}. Pass the "
            "buffers that the layer started with or that training returned."
        )
    routes = choose(
        router,
        parts.logits(x, name),
        k,
        choice_bias=bias,
        noise=widened(noise, backend) if noisy else None,
        backend=backend,
    )
    if not training or bias is None:
        return routes, {}
    return routes, {kept: next_bias(router, bias, routes, backend, across)}
