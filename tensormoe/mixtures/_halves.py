"""Sums over all pairs of halves of experts, at the price of the halves.

With weights g¹_hi · g²_hj of expert (i, j) in head h, the sums over i and over j come apart (Monet,
Park et al. 2025, section 3, arXiv 2412.04139), so that nothing has an entry per pair.
"""

from __future__ import annotations

from tensormoe.backend import Array, Backend
from tensormoe.functional._dtypes import cast
from tensormoe.mixtures._experts import Act
from tensormoe.mixtures._parts import Parts
from tensormoe.routing import LevelRoutes, spread


def run_horizontal(parts: Parts, act: Act, x: Array, routes: LevelRoutes) -> Array:
    """Outputs (tokens, out) of experts V_j act(U_i x + b_i) + c_j.

    Σ_j V_j Σ_h g²_hj Σ_i g¹_hi act(U_i x + b_i): hidden layers are mixed into one per head, then
    out of the heads into one per upper half.

    Args:
        parts: runs ``bottom.up_proj`` and ``top.down_proj``.
        act: the activation.
        x: (tokens, in).
        routes: weights (tokens, heads, k) of each level.
    """
    backend = parts.backend
    first, second = _weights(routes, x, backend)
    units = _units(parts, "bottom.up_proj", act, x, first.shape[2])
    mixed = backend.matmul(_swapped(second, backend), backend.matmul(first, units))
    y = _layer(parts, "top.down_proj", _flat(mixed, backend))
    return _with_bias(y, parts, "top.bias", second, first)


def run_vertical(parts: Parts, act: Act, x: Array, routes: LevelRoutes) -> Array:
    """Outputs (tokens, out) of experts whose left half is i's and right half is j's.

    With hidden units a_i = act(U¹_i x + b¹_i) and a_j = act(U²_j x + b²_j), the left outputs are
    V¹¹_i a_i + V¹²_i a_j + c¹_i, and the right ones V²¹_j a_i + V²²_j a_j + c²_j.

    Args:
        parts: runs the layers ``up_proj``, ``down_proj`` (from a half to itself) and ``cross_proj``
            (from the other half) of ``left`` and ``right``.
        act: the activation.
        x: (tokens, in).
        routes: weights (tokens, heads, k) of each level.
    """
    weights = _weights(routes, x, parts.backend)
    units = [
        _units(parts, f"{side}.up_proj", act, x, each.shape[2])
        for side, each in zip(("left", "right"), weights, strict=True)
    ]
    left = _side(parts, "left", weights[0], weights[1], units[0], units[1])
    right = _side(parts, "right", weights[1], weights[0], units[1], units[0])
    return parts.backend.namespace.concat([left, right], axis=1)


def _side(parts: Parts, side: str, mine: Array, other: Array, units: Array, others: Array) -> Array:
    """Outputs of one side: of its own hidden units, and of those of the other side, mixed."""
    backend = parts.backend
    own = units * _use(mine, other, backend)
    mixed = backend.matmul(_swapped(mine, backend), backend.matmul(other, others))
    y = _layer(parts, f"{side}.down_proj", _flat(own, backend))
    y = y + _layer(parts, f"{side}.cross_proj", _flat(mixed, backend))
    return _with_bias(y, parts, f"{side}.bias", mine, other)


def _weights(routes: LevelRoutes, x: Array, backend: Backend) -> list[Array]:
    """Weights (tokens, heads, N_e) per level, in the dtype of the tokens."""
    return [
        cast(spread(level.chosen, level.logits.shape[-1], backend), x.dtype, backend)
        for level in routes.levels
    ]


def _use(mine: Array, other: Array, backend: Backend) -> Array:
    """Weights (tokens, N, 1) of all experts that have a half: Σ_h g_hn Σ_m g'_hm."""
    totals = backend.namespace.sum(other, axis=-1, keepdims=True)
    return backend.matmul(_swapped(mine, backend), totals)


def _with_bias(y: Array, parts: Parts, name: str, mine: Array, other: Array) -> Array:
    bias = parts.arrays.get(name)
    if bias is None:
        return y
    used = _flat(_use(mine, other, parts.backend), parts.backend)
    return y + parts.backend.matmul(used, cast(bias, used.dtype, parts.backend))


def _units(parts: Parts, name: str, act: Act, x: Array, count: int) -> Array:
    """Hidden units (tokens, N, units) of all halves of a kind."""
    made = act(_layer(parts, name, x))
    return parts.backend.reshape(made, (x.shape[0], count, made.shape[1] // count))


def _layer(parts: Parts, name: str, x: Array) -> Array:
    ones = parts.backend.namespace.ones_like(parts.backend.stop_gradient(x[:, :1]))
    return parts.call(name, x, ones)


def _swapped(array: Array, backend: Backend) -> Array:
    return backend.permute(array, (0, 2, 1))


def _flat(array: Array, backend: Backend) -> Array:
    return backend.reshape(array, (array.shape[0], array.shape[1] * array.shape[2]))
