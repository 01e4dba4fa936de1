"""Experts of tokens that a router has sent, where nothing stands around their layers."""

from __future__ import annotations

from collections.abc import Mapping

from tensormoe._config import LayerConfig
from tensormoe.backend import Array, Backend, default_integer, device_of
from tensormoe.functional._dtypes import cast
from tensormoe.functional._sent import Sent, enter_experts, leave_experts, sum_rows
from tensormoe.gates import OneExpert
from tensormoe.mixtures._experts import Act, run_expert
from tensormoe.routing import by_expert


def run_sent(
    layers: Mapping[str, LayerConfig],
    parameters: Mapping[str, Mapping[str, Array]],
    act: Act,
    x: Array,
    index: Array,
    weights: Array,
    experts: int,
    backend: Backend,
    *,
    biases: Mapping[str, Array] | None = None,
    sort: bool = False,
    any_batch: bool = False,
) -> Array:
    """Weighted sums (tokens, out) of the outputs of the experts that each token was sent to.

    The same numbers as those of :func:`send` around :func:`run_expert`, but what all experts have
    in common is multiplied once per token: by the input of the first layers, and by the weighted
    sum behind the last one.

    Args:
        layers: by role, two at least.
        parameters: of each layer, by canonical name.
        act: the activation between the layers.
        x: (tokens, in).
        index: (tokens, k) numbers of experts.
        weights: (tokens, k), in any floating-point dtype.
        experts: N.
        backend: the adapter of the arrays' library.
        biases: (N, out) by role, of layers without a bias of their own.
        sort: whether rows are sorted by expert.
        any_batch: whether to run the programs for large batches, which are right for all.

    Returns:
        (tokens, out), in the dtype of ``x``.
    """
    tokens, k = index.shape
    shares = backend.reshape(weights, (tokens * k,))
    if sort:
        found = by_expert(index, experts, backend)
        sent = Sent(found.token, OneExpert(found.expert, found.counts), tokens)
        shares = backend.take(shares, found.order, 0)
    else:
        xp = backend.namespace
        rows = xp.arange(tokens * k, dtype=default_integer(xp), device=device_of(index))
        sent = Sent(rows // k, OneExpert(backend.reshape(index, (tokens * k,))), tokens)

    def project(role: str, rows: Array) -> Array:
        config, arrays = layers[role], parameters[role]
        bias = None if biases is None else biases.get(role)
        own = None if bias is None else backend.take(bias, sent.chosen.indices, 0)
        if role != "down_proj":
            made = enter_experts(config, arrays, rows, sent, backend, any_batch=any_batch)
            return made if own is None else made + own
        made = leave_experts(config, arrays, rows, sent, shares, backend, any_batch=any_batch)
        return made if own is None else made + sum_rows(own, sent, shares, 0, backend)

    return cast(run_expert(layers, project, act, x), x.dtype, backend)
