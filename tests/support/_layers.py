"""Probes of factorizations and gates: the layer is its definition, and its gradients are slopes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from tensormoe import Gate, LayerSpec
from tensormoe.factorizations import FACTORIZATIONS, rank_pattern, resolve_factorization
from tensormoe.functional import LayerConfig
from tensormoe.testing import assert_output
from tests._everywhere import FRAMEWORKS
from tests._frameworks import NUMPY, Call, Config, Framework, everywhere
from tests._one_layer import TOLERANCES, assert_found, call_of, values
from tests.support._table import Row, Table

STEP = 1e-6
"""Of central differences in float64, where values are near 1."""

COLUMNS = tuple(framework.name for framework in FRAMEWORKS)

GATES = {
    "entmax with α = 1.5, layer norm (the default)": Gate(),
    "entmax with another α": Gate(alpha=1.25),
    "sparsemax": Gate("sparsemax"),
    "softmax": Gate("softmax"),
    "top-k": Gate("top_k", k=2),
    "batch norm": Gate(normalization="batch"),
    "no normalization": Gate("softmax", normalization=None),
    "projection with bias": Gate("softmax", bias=True),
}


def prepared(config: Config, how: str, lead: tuple[int, ...], dtype: str = "float64") -> tuple:
    """Random arrays and a call, the same each time."""
    rng = np.random.default_rng(0)
    arrays = values(config, rng, dtype)
    call = call_of(config, arrays, lead, how, rng, dtype)
    assert call is not None
    return arrays, call


def check_slopes(framework: Framework, config: Config, arrays: dict, call: Call) -> None:
    """Gradients are central differences of the output in training, along one random direction."""
    found = framework.run(framework.restore(config, arrays), call)
    rng = np.random.default_rng(1)
    direction = {name: rng.standard_normal(each.shape) for name, each in found.gradients.items()}
    moved = []
    for sign in (STEP, -STEP):
        there = {name: each + sign * direction.get(name, 0.0) for name, each in arrays.items()}
        x, made = call.x, call.made
        if "input" in direction:
            x = x + sign * direction["input"]
        if made is not None:
            made = [
                each + sign * direction[f"coefficients_{level}"] for level, each in enumerate(made)
            ]
        layer = framework.restore(config, there)
        moved.append(framework.run(layer, replace(call, x=x, made=made)).trained)
    slope = float(np.sum(call.cotangent * (moved[0] - moved[1]))) / (2 * STEP)
    along = sum(float(np.sum(found.gradients[name] * each)) for name, each in direction.items())
    assert abs(slope - along) <= 1e-7 * max(1.0, abs(slope)), (slope, along)


def check_factorization(framework: Framework, name: str) -> None:
    """Factorized equals unfactorized, by TensorLy's reconstruction; with gradients."""
    rank = 2 if rank_pattern(name) else None
    spec = LayerSpec(4, 3, (3, 2), resolve_factorization(name, rank), bias=True)
    config = LayerConfig(spec, None)
    arrays, call = prepared(config, "dense", (3,))
    with framework.precision("float64"):
        output = framework.run(framework.restore(config, arrays), call).output
        factors = {name.removeprefix("factors."): each for name, each in arrays.items()}
        assert_output(output, spec.factorization, factors, call.made, call.x)
        check_slopes(framework, config, arrays, call)


def check_gate(framework: Framework, gate: Gate) -> None:
    """The same coefficients as NumPy's, through the output; with gradients."""
    config = LayerConfig(LayerSpec(4, 3, 5, resolve_factorization("cp", 2)), gate)
    arrays, call = prepared(config, "gate", (4,))
    with framework.precision("float64"):
        found = framework.run(framework.restore(config, arrays), call)
        want = NUMPY.run(NUMPY.restore(config, arrays), call)
        assert_found(found, want, TOLERANCES["float64"], str(framework))
        check_slopes(framework, config, arrays, call)


def _row(name: str, check: object, value: object) -> Row:
    return Row(name, tuple(partial(running, check, each, value) for each in FRAMEWORKS))


def running(check: object, framework: Framework, *values: object) -> None:
    """A check of a framework, with CuPy's layers running."""
    assert callable(check)
    with everywhere():
        check(framework, *values)


FACTORIZATION_TABLE = Table(
    "Factorizations",
    "A layer of two levels of experts with biases: its output is that of its experts built by "
    "TensorLy, and its gradients by input, coefficients and parameters are finite differences.",
    "factorization",
    COLUMNS,
    tuple(_row(f"`{name}`", check_factorization, name) for name in FACTORIZATIONS),
)

GATE_TABLE = Table(
    "Gates",
    "A layer with such a gate, in training and outside: outputs, running statistics and gradients "
    "are NumPy's, and finite differences.",
    "gate",
    COLUMNS,
    tuple(_row(name, check_gate, gate) for name, gate in GATES.items()),
)
