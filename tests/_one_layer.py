"""Layers, values and inputs for which two libraries must agree to the last digits.

Values have the size of a layer's first ones, so that sums come out near 1 and an error relative to
them is one of rounding. Logits keep away from where a gate's derivative jumps: there, one ulp
decides which expert is used, and no two libraries agree on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from tensormoe import Gate, LayerSpec, TopK, entmax
from tensormoe._config import ACTIVATIONS
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe.testing import batch_shapes, gates, specs
from tests._frameworks import Arrays, Call, Config, Found, Framework, class_name

TOLERANCES = {"float16": 2e-2, "float32": 1e-5, "float64": 1e-12}
"""Largest difference between two frameworks, relative to an array's largest entry or to 1."""


def values(config: Config, rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    """Random parameters and statistics by canonical name."""
    parts: list[tuple[str, LayerConfig]] = [("", config)]  # type: ignore[list-item]
    if isinstance(config, BlockConfig):
        parts = [("first.", config.first), ("second.", config.second)]
    scales = {
        f"{part}factors.{name}": scale for part, layer in parts for name, scale in _scales(layer)
    }
    drawn = {
        name: rng.standard_normal(shape) * scales.get(name, shape[0] ** -0.5)
        for name, shape in config.parameter_shapes().items()
    }
    for name, shape in config.buffer_shapes().items():
        drawn[name] = rng.uniform(0.5, 2.0, shape) * (1.0 if "variance" in name else 0.1)
    return {name: array.astype(dtype) for name, array in drawn.items()}


def _scales(config: LayerConfig) -> list[tuple[str, float]]:
    """What makes each sum over a bond, and over the input, as large as one of its terms."""
    network, spec = config.spec.network, config.spec
    count = Counter(leg for factor in network.factors for leg in factor.legs)
    found = []
    for factor in network.all_factors:
        sizes = dict(zip(factor.legs, spec.shapes[factor.name], strict=True))
        scale = 1.0
        for leg, size in sizes.items():
            if leg == "i" and not config.indexed_input:
                scale *= size**-0.5
            elif count[leg] > 1 and leg != "o":
                scale *= size ** (-0.5 / count[leg])
        found.append((factor.name, scale))
    return found


def inputs(
    config: Config, arrays: Arrays, lead: tuple[int, ...], rng: np.random.Generator, dtype: str
) -> np.ndarray | None:
    """Inputs whose logits are away from where the gate's derivative jumps, if there are any."""
    layer = config.first if isinstance(config, BlockConfig) else config
    features, rows = layer.spec.in_features, int(np.prod(lead))
    batch = layer.gate is not None and layer.gate.normalization == "batch"
    for _ in range(100):
        x = rng.standard_normal((rows if batch else 64 * rows, features)).astype(dtype)
        good = np.ones(len(x), bool) if layer.gate is None else separated(layer, arrays, x)
        if np.sum(good) >= rows:
            return x[good][:rows].reshape(*lead, features)
    return None


def separated(config: LayerConfig, arrays: Arrays, x: np.ndarray) -> np.ndarray:
    """Which rows are far enough from every jump of the gate, at each level."""
    gate, rows = config.gate, x.astype("float64")
    assert gate is not None
    good = np.ones(len(rows), bool)
    for level in range(config.spec.levels):
        raw = rows @ arrays[f"gate.projection_{level}"]
        raw = raw + arrays.get(f"gate.bias_{level}", 0.0)
        if gate.normalization is None:
            every = [raw]
        elif gate.normalization == "layer":
            spread = raw.std(axis=1, keepdims=True)
            # a row of nearly equal logits is divided by nearly nothing
            good &= (spread[:, 0] > 0.3) | (raw.shape[1] == 1)
            every = [(raw - raw.mean(axis=1, keepdims=True)) / np.sqrt(spread**2 + gate.eps)]
        else:
            spread = raw.std(axis=0)
            good &= bool(np.all(spread > 0.3))
            mean, variance = (
                arrays[f"gate.running_{name}_{level}"] for name in ("mean", "variance")
            )
            every = [
                (raw - raw.mean(axis=0)) / np.sqrt(spread**2 + gate.eps),
                (raw - mean) / np.sqrt(variance + gate.eps),
            ]
        scale = 1.0 if gate.normalization is None else gate.spread_of(raw.shape[1])
        for logits in every:
            # a bias for the choice moves the jumps
            bias = arrays.get(f"gate.choice_bias_{level}", 0.0)
            good &= _distance(gate, scale * logits + bias) > 0.0
    return good


def _distance(gate: Gate, logits: np.ndarray) -> np.ndarray:
    """How much farther than it must be the nearest logit of each row is from a jump."""
    far = np.full(len(logits), 1.0)
    if gate.activation == "top_k":
        assert gate.k is not None
        if gate.k == logits.shape[1]:
            return far
        ordered = -np.sort(-logits, axis=1)
        return ordered[:, gate.k - 1] - ordered[:, gate.k] - 1e-3
    if gate.activation == "relu_top_k":
        assert gate.k is not None
        far = np.min(np.abs(logits), axis=1) - 1e-3
        if gate.k == logits.shape[1]:
            return far
        ordered = -np.sort(-np.maximum(logits, 0.0), axis=1)
        # only a positive logit can be the last that is kept
        apart = ordered[:, gate.k - 1] - ordered[:, gate.k] - 1e-3
        return np.where(ordered[:, gate.k - 1] > 0.0, np.minimum(far, apart), far)
    alpha = gate.effective_alpha
    # below, the derivative goes to zero with the coefficient
    if alpha <= 1.5:
        return far
    made = entmax(logits, alpha=alpha)
    scaled = (alpha - 1.0) * logits
    first = np.argmax(scaled, axis=1)[:, None]
    threshold = np.take_along_axis(scaled - made ** (alpha - 1.0), first, axis=1)
    # at α = 2 it jumps; above, it grows without bound towards the threshold
    least = 1e-2 if alpha < 2.0 else 1e-4 if alpha == 2.0 else 0.1
    return np.min(np.abs(scaled - threshold), axis=1) - least


def call_of(
    config: Config,
    arrays: Arrays,
    lead: tuple[int, ...],
    how: str,
    rng: np.random.Generator,
    dtype: str,
) -> Call | None:
    """An input with coefficients from the gate, or given ``"dense"`` or ``"indexed"``."""
    layer = config.first if isinstance(config, BlockConfig) else config
    last = config.second if isinstance(config, BlockConfig) else config
    if layer.indexed_input:
        x: np.ndarray | None = rng.integers(layer.spec.in_features, size=lead)
    else:
        x = inputs(config, arrays, lead, rng, dtype)
    if x is None:
        return None
    made: list[Any] | None = None
    if how == "dense":
        made = [_sparse(count, lead, rng).astype(dtype) for count in layer.spec.experts]
    elif how == "indexed":
        k = (min(layer.spec.experts) + 1) // 2
        made = [_indexed(count, k, lead, rng, dtype) for count in layer.spec.experts]
    cotangent = rng.standard_normal((*lead, last.spec.out_features))
    cotangent /= max(1.0, float(np.linalg.norm(cotangent)))
    return Call(x, made, cotangent.astype(dtype))


def _sparse(count: int, lead: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return _shares(rng.standard_normal((*lead, count)) * (rng.random((*lead, count)) < 0.5))


def _shares(weights: np.ndarray) -> np.ndarray:
    """Of either sign, their absolute values summing to one; or all zero."""
    total = np.sum(np.abs(weights), axis=-1, keepdims=True)
    return weights / np.where(total > 0.0, total, 1.0)


def _indexed(
    count: int, k: int, lead: tuple[int, ...], rng: np.random.Generator, dtype: str
) -> TopK:
    order = np.argsort(rng.random((*lead, count)), axis=-1)[..., :k]
    shares = _shares(rng.standard_normal(order.shape))
    return TopK(np.ascontiguousarray(order), shares.astype(dtype))


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Layers, blocks and embeddings of any factorization, levels, gate and bias."""
    kind = draw(st.sampled_from(["layer", "layer", "block", "embedding"]))
    if kind == "embedding":
        return LayerConfig(draw(specs(bias=False)), None, indexed_input=True)
    spec = draw(specs())
    gate = draw(gates(spec.experts, batch_norm=True))
    if gate.normalization == "batch" and gate.alpha > 2.0:
        # whole batches without a logit near the threshold are too rare to be drawn
        gate = replace(gate, alpha=2.0)
    if kind == "layer":
        return LayerConfig(spec, gate)
    gated = draw(st.booleans())
    wide = replace(spec, out_features=2 * spec.out_features) if gated else spec
    other = draw(specs(levels=spec.levels, bias=spec.bias))
    second = LayerSpec(
        spec.out_features, other.out_features, spec.experts, other.factorization, spec.bias
    )
    act = draw(st.sampled_from(ACTIVATIONS))
    return BlockConfig(LayerConfig(wide, gate), LayerConfig(second, None), act, gated=gated)


def ways(config: Config) -> Sequence[str]:
    """How coefficients may come to a layer."""
    if isinstance(config, LayerConfig) and config.indexed_input:
        return ("dense", "indexed")
    return ("gate", "dense", "indexed")


def leads(config: Config) -> st.SearchStrategy[tuple[int, ...]]:
    """Leading shapes; several rows where they normalize one another."""
    layer = config.first if isinstance(config, BlockConfig) else config
    if layer.gate is not None and layer.gate.normalization == "batch":
        return st.sampled_from([(3,), (5,), (2, 3)])
    return batch_shapes(3)


def assert_one_file(
    config: Config, arrays: Arrays, frameworks: Sequence[Framework], folder: Path
) -> bytes:
    """Whoever writes a layer, the bytes are the same; returns them."""
    first: bytes | None = None
    dtype = arrays[next(iter(config.parameter_shapes()))].dtype.name
    for framework in frameworks:
        path = folder / framework.name
        with framework.precision(dtype):
            framework.save(framework.restore(config, arrays), path)
        content = path.read_bytes()
        path.unlink()
        assert first is None or content == first, f"{framework} writes another file"
        first = content
    assert first is not None
    return first


def assert_any_layer_is_one(
    data: st.DataObject,
    frameworks: Sequence[Framework],
    folder: Path,
    tolerances: Mapping[str, float] = TOLERANCES,
) -> None:
    """A layer that is drawn has one file, and is the same in each library that opens it."""
    config = data.draw(configs(), "config")
    dtype = data.draw(st.sampled_from(["float32", "float64"]), "dtype")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    arrays = values(config, rng, dtype)
    lead, how = data.draw(leads(config), "lead"), data.draw(st.sampled_from(ways(config)), "how")
    call = call_of(config, arrays, lead, how, rng, dtype)
    assume(call is not None)
    assert call is not None
    path = folder / "layer"
    path.write_bytes(assert_one_file(config, arrays, frameworks, folder))
    assert_one_layer(path, config, arrays, call, frameworks, tolerances)


def assert_one_layer(
    path: Path,
    config: Config,
    arrays: Arrays,
    call: Call,
    frameworks: Sequence[Framework],
    tolerances: Mapping[str, float] = TOLERANCES,
) -> None:
    """Whoever opens the file, outputs, gradients and statistics are the same."""
    dtype = call.cotangent.dtype.name
    kind = class_name(config)
    first: tuple[Framework, Found] | None = None
    for framework in frameworks:
        with framework.precision(dtype):
            layer = framework.load(kind, path)
            assert layer.config == config
            held = framework.arrays(layer)
            assert set(held) == set(arrays), framework
            for name, array in arrays.items():
                # before the call: it changes statistics, in the very memory perhaps
                assert held[name].dtype == array.dtype, f"{framework}: {name}"
                np.testing.assert_array_equal(held[name], array, f"{framework}: {name}")
            found = framework.run(layer, call)
        if first is None:
            first = framework, found
            continue
        assert_found(found, first[1], tolerances[dtype], f"{framework}, not as {first[0]}")


def assert_found(found: Found, want: Found, tolerance: float, who: str) -> None:
    """Two frameworks say the same."""
    assert_near(found.output, want.output, tolerance, f"{who}: output")
    assert_near(found.trained, want.trained, tolerance, f"{who}: output in training")
    for what in ("gradients", "buffers"):
        ours, theirs = getattr(found, what), getattr(want, what)
        assert set(ours) == set(theirs), f"{who}: {what}"
        for name, array in theirs.items():
            assert_near(ours[name], array, tolerance, f"{who}: {what} of {name}")


def assert_near(got: np.ndarray, want: np.ndarray, tolerance: float, what: str) -> None:
    """Equal up to ``tolerance``, relative to the largest entry or to 1."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    size = max(1.0, float(np.max(np.abs(want), initial=0.0)))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * size, err_msg=what)
