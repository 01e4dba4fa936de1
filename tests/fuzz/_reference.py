"""The layer as the papers define it: dense weights, plain sums, float64, nothing of the library.

Gates are solved by bisection, gradients come from differences of the layer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.special import erf, expit

from tensormoe import Gate, TopK
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe.testing import reconstruct_by_einsum, reference_output
from tests._frameworks import Config

Arrays = Mapping[str, np.ndarray]


def reference(config: Config, arrays: Arrays, x: np.ndarray, made: Any, training: bool) -> Any:
    """The output of a layer or block in float64.

    Args:
        config: the layer.
        arrays: parameters and statistics by canonical name.
        x: inputs, or ids.
        made: ready-made coefficients, an array or a ``TopK`` per level; None for the gate's.
        training: whether batch norm uses the batch's own statistics.
    """
    doubles = {name: np.asarray(array, "float64") for name, array in arrays.items()}
    if isinstance(config, LayerConfig):
        given = _coefficients(config, doubles, x, made, training)
        return _experts(config, doubles, "", x, given)
    given = _coefficients(config.first, doubles, x, made, training)
    hidden = _experts(config.first, doubles, "first.", x, given)
    return _experts(config.second, doubles, "second.", _activated(config, hidden), given)


def is_at_kink(config: Config, arrays: Arrays, x: np.ndarray, made: Any) -> bool:
    """Whether an input of ReLU is zero, as where a row has no coefficients: there, the second
    derivative is what a library takes it for.
    """
    if not isinstance(config, BlockConfig) or config.act_layer != "relu":
        return False
    doubles = {name: np.asarray(array, "float64") for name, array in arrays.items()}
    given = _coefficients(config.first, doubles, x, made, training=True)
    hidden = _experts(config.first, doubles, "first.", x, given)
    return bool(np.any(np.abs(hidden) < 1e-12))


def _activated(config: BlockConfig, hidden: np.ndarray) -> Any:
    act = _ACTIVATIONS[config.act_layer]
    if not config.gated:
        return act(hidden)
    half = hidden.shape[-1] // 2
    return act(hidden[..., :half]) * hidden[..., half:]


def _experts(config: LayerConfig, arrays: Arrays, part: str, x: Any, given: list[Any]) -> Any:
    prefix = f"{part}factors."
    factors = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    weights = reconstruct_by_einsum(config.spec.factorization, factors)
    if config.indexed_input:
        x = np.eye(config.spec.in_features)[x]
    return reference_output(weights, given, np.asarray(x, "float64"))


def _coefficients(
    config: LayerConfig, arrays: Arrays, x: Any, made: Any, training: bool
) -> list[np.ndarray]:
    if made is not None:
        counts = config.spec.experts
        return [_dense(each, count) for each, count in zip(made, counts, strict=True)]
    found, gate = [], config.gate
    assert gate is not None
    for level in range(config.spec.levels):
        logits = np.asarray(x, "float64") @ arrays[f"gate.projection_{level}"]
        logits = logits + arrays.get(f"gate.bias_{level}", 0.0)
        rows = logits.reshape(-1, logits.shape[-1])
        found.append(activate(gate, _normalized(gate, rows, arrays, level, training)))
        found[-1] = found[-1].reshape(logits.shape)
    return found


def _normalized(gate: Gate, rows: Any, arrays: Arrays, level: int, training: bool) -> np.ndarray:
    if gate.normalization is None:
        return rows
    axis = 1 if gate.normalization == "layer" else 0
    mean, variance = rows.mean(axis, keepdims=True), rows.var(axis, keepdims=True)
    if gate.normalization == "batch" and not training:
        mean, variance = (arrays[f"gate.running_{n}_{level}"] for n in ("mean", "variance"))
    return gate.spread_of(rows.shape[-1]) * (rows - mean) / np.sqrt(variance + gate.eps)


def activate(gate: Gate, rows: np.ndarray) -> np.ndarray:
    """Coefficients of normalized logits (rows, N)."""
    if not rows.size:
        return rows
    if gate.activation == "top_k":
        assert gate.k is not None
        kept = np.argsort(-rows, axis=1, kind="stable")[:, : gate.k]
        masked = np.full_like(rows, -np.inf)
        np.put_along_axis(masked, kept, np.take_along_axis(rows, kept, 1), 1)
        rows = masked
    if gate.activation == "relu_top_k":
        assert gate.k is not None
        kept = np.argsort(-rows, axis=1, kind="stable")[:, : gate.k]
        found = np.zeros_like(rows)
        np.put_along_axis(found, kept, np.maximum(np.take_along_axis(rows, kept, 1), 0.0), 1)
        return found
    if gate.activation in ("softmax", "top_k"):
        shares = np.exp(rows - rows.max(axis=1, keepdims=True))
        return shares / shares.sum(axis=1, keepdims=True)
    return bisected_entmax(rows, 2.0 if gate.activation == "sparsemax" else gate.alpha)


def bisected_entmax(rows: np.ndarray, alpha: float) -> np.ndarray:
    """Entmax (Peters et al. 2019, eq. 10) with the threshold by bisection."""
    if alpha == 1.0:
        shares = np.exp(rows - rows.max(axis=1, keepdims=True))
        return shares / shares.sum(axis=1, keepdims=True)
    scaled = (alpha - 1.0) * rows
    high = scaled.max(axis=1, keepdims=True)
    low = high - 1.0
    for _ in range(64):
        middle = (low + high) / 2.0
        mass = (np.maximum(scaled - middle, 0.0) ** (1.0 / (alpha - 1.0))).sum(1, keepdims=True)
        low, high = np.where(mass >= 1.0, middle, low), np.where(mass >= 1.0, high, middle)
    shares = np.maximum(scaled - low, 0.0) ** (1.0 / (alpha - 1.0))
    return shares / shares.sum(axis=1, keepdims=True)


def _dense(given: Any, count: int) -> np.ndarray:
    if not isinstance(given, TopK):
        return np.asarray(given, "float64")
    one_hot = np.eye(count)[np.asarray(given.indices)]
    return np.einsum("...kn,...k->...n", one_hot, np.asarray(given.values, "float64"))


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": lambda x: x * 0.5 * (1.0 + erf(x / np.sqrt(2.0))),
    "gelu_tanh": lambda x: x * 0.5 * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0.0),
    "silu": lambda x: x * expit(x),
    "tanh": np.tanh,
}
