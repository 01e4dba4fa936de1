"""The experts' forward pass, in the engine's own integers, with any stand-in for its products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from _stockfish.network import EXPERTS, Layer, Network
from _stockfish.positions import TOP, Samples
from tensormoe import TopK
from tensormoe.decomposition import Decomposition
from tensormoe_numpy import MuMoE

__all__ = ["Product", "Trace", "dense", "factorized", "run"]

Product = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Inputs (samples, in) and experts (samples,) → (samples, out), in units of integer weights."""

# hidden units behind the first layer; the last of its outputs goes straight to the end
_HIDDEN = 15
_SHIFT = 64
# of the direct output, of the value in the engine's units, and of these in a pawn
_DIRECT, _VALUE, _PAWN = 9600 / (127 * 64), 16, 361


@dataclass(frozen=True, eq=False)
class Trace:
    """Inputs and results of a forward pass.

    Args:
        inputs: of each layer, (samples, in), float32.
        pawns: (samples,), what the expert says for the side to move.
    """

    inputs: tuple[np.ndarray, ...]
    pawns: np.ndarray


def dense(layer: Layer) -> Product:
    """The products as they are, without rounding."""
    weights = layer.integers.astype("float64")

    def product(inputs: np.ndarray, experts: np.ndarray) -> np.ndarray:
        found = np.empty((len(inputs), weights.shape[-1]))
        for expert in range(EXPERTS):
            mine = experts == expert
            found[mine] = inputs[mine].astype("float64") @ weights[expert]
        return found

    return product


def factorized(found: Decomposition, step: float) -> Product:
    """The products by a layer of factors, each sample routed to its expert."""
    layer = MuMoE.restore(found.config(), found.parameters)

    def product(inputs: np.ndarray, experts: np.ndarray) -> np.ndarray:
        chosen = TopK(experts[:, None], np.ones((len(experts), 1), inputs.dtype))
        return layer(inputs, chosen).astype("float64") / step

    return product


def run(network: Network, products: Sequence[Product], samples: Samples) -> Trace:
    """All three layers. Exact for dense products: floors and cuts are the engine's."""
    biases = [layer.bias[samples.experts] for layer in network.layers]
    first, second, third = products
    x, experts = samples.inputs, samples.experts
    h = first(x, experts) + biases[0]
    hidden, direct = h[:, :_HIDDEN], h[:, _HIDDEN]
    squares = np.minimum(np.floor(hidden**2 / (4096 * 128)), TOP)
    z = np.concatenate([squares, _activated(hidden)], axis=1).astype("float32")
    g = _activated(second(z, experts) + biases[1]).astype("float32")
    value = (third(g, experts) + biases[2])[:, 0] + np.trunc(direct * _DIRECT)
    return Trace((x, z, g), value / (_VALUE * _PAWN))


def _activated(values: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(values / _SHIFT), 0, TOP)
