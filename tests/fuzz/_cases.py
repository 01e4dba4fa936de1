"""Random layers, blocks and embeddings, and calls of them, from the number of a case alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tensormoe import Gate, LayerSpec
from tensormoe.factorizations import FACTORIZATIONS, Factorization, resolve_factorization
from tensormoe.functional import BlockConfig, LayerConfig
from tests._frameworks import Call, Config
from tests._one_layer import ACTIVATIONS, call_of, values, ways

SEED = 20_260


@dataclass(frozen=True, eq=False)
class Case:
    """A call of a layer.

    Args:
        config: the layer.
        dtype: of parameters, inputs and given coefficients.
        arrays: parameters and statistics by canonical name.
        call: what the layer is given.
        rng: for directions to differentiate in.
    """

    config: Config
    dtype: str
    arrays: dict[str, np.ndarray]
    call: Call
    rng: np.random.Generator


def draw_case(index: int, per_layer: int, *, one_shape: bool) -> Case | None:
    """The case of a number; None where its gate leaves no input away from jumps.

    Args:
        index: of the case.
        per_layer: cases in a row that share a layer, and with ``one_shape`` shapes and dtype.
        one_shape: whether every new shape must be compiled.
    """
    layers = np.random.default_rng([SEED, index // per_layer])
    config = draw_config(layers)
    rng = np.random.default_rng([SEED, index // per_layer, index % per_layer, 1])
    shapes = layers if one_shape else rng
    dtype = str(shapes.choice(["float32", "float64"]))
    lead = _lead(config, shapes)
    how = str(shapes.choice(ways(config)))
    arrays = values(config, rng, dtype)
    call = call_of(config, arrays, lead, how, rng, dtype)
    return None if call is None else Case(config, dtype, arrays, call, rng)


def draw_config(rng: np.random.Generator) -> Config:
    """A layer of any factorization, levels, gate and bias; of a block or an embedding too."""
    levels = int(rng.choice([1, 1, 2, 3]))
    experts = tuple(int(size) for size in rng.integers(1, 7, levels))
    bias = bool(rng.integers(2))
    kind = str(rng.choice(["layer", "layer", "block", "embedding"]))
    sizes = [int(size) for size in rng.integers(1, 9, 3)]
    if kind == "embedding":
        spec = LayerSpec(sizes[0], sizes[1], experts, _factorization(levels, rng), bias=False)
        return LayerConfig(spec, None, indexed_input=True)
    gate = _gate(experts, rng)
    if kind == "layer":
        spec = LayerSpec(sizes[0], sizes[1], experts, _factorization(levels, rng), bias)
        return LayerConfig(spec, gate)
    gated = bool(rng.integers(2))
    wide = sizes[1] * (2 if gated else 1)
    first = LayerSpec(sizes[0], wide, experts, _factorization(levels, rng), bias)
    second = LayerSpec(sizes[1], sizes[2], experts, _factorization(levels, rng), bias)
    act = str(rng.choice(ACTIVATIONS))
    return BlockConfig(LayerConfig(first, gate), LayerConfig(second, None), act, gated=gated)


def _factorization(levels: int, rng: np.random.Generator) -> Factorization:
    name = str(rng.choice([*FACTORIZATIONS]))
    probe = FACTORIZATIONS[name]
    bonds = len(_pattern(probe, levels))
    if not bonds:
        return resolve_factorization(name)
    rank = tuple(int(size) for size in rng.integers(1, 6, bonds))
    return resolve_factorization(name, rank if bonds > 1 else rank[0])


def _pattern(kind: type[Factorization], levels: int) -> tuple[str, ...]:
    # a pattern does not depend on the rank that a value has
    return kind.rank_pattern(kind.__new__(kind), levels)


def _gate(experts: tuple[int, ...], rng: np.random.Generator) -> Gate:
    name = str(rng.choice(["entmax", "entmax", "sparsemax", "softmax", "top_k", "relu_top_k"]))
    options: dict[str, Any] = {"normalization": [None, "layer", "batch"][rng.integers(3)]}
    if name == "entmax":
        # beyond 2, whole batches away from the threshold are too rare to be drawn
        most = 2.0 if options["normalization"] == "batch" else 3.0
        options["alpha"] = float(rng.choice([1.25, 1.5, 1.5, 1.75, 2.0, min(2.5, most)]))
    if name.endswith("top_k"):
        options["k"] = int(rng.integers(1, min(experts) + 1))
    if options["normalization"] is not None:
        options["spread"] = [None, 0.25, 1.0, 3.0][rng.integers(4)]
        options["eps"] = float(rng.choice([1.0, 1e-5]))
    return Gate(name, bias=bool(rng.integers(2)), **options)


def _lead(config: Config, rng: np.random.Generator) -> tuple[int, ...]:
    layer = config.first if isinstance(config, BlockConfig) else config
    if layer.gate is not None and layer.gate.normalization == "batch":
        return [(3,), (5,), (2, 3)][rng.integers(3)]
    shapes = [(), (1,), (5,), (2, 3), (0,), (3, 0)]
    return shapes[rng.choice(len(shapes), p=[0.15, 0.2, 0.3, 0.25, 0.05, 0.05])]
