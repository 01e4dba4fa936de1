"""The usual gate in few passes: exact whatever the logits, or left to the general function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tensormoe.errors import GateError
from tensormoe.gates import Gate, activate
from tensormoe.gates._normalization import LayerNorm
from tensormoe.gates._passes import entmax15_of_rows
from tensormoe_numpy import BACKEND

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]

KINDS: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "tiny": lambda rng, shape: 1e-6 * rng.standard_normal(shape),
    "huge": lambda rng, shape: 1e4 * rng.standard_normal(shape),
    "heavy tails": lambda rng, shape: rng.standard_t(2, shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "skewed up": lambda rng, shape: rng.exponential(1.0, shape),
    "skewed down": lambda rng, shape: -rng.exponential(1.0, shape),
    "two values": lambda rng, shape: rng.integers(0, 2, shape).astype(float),
    "ties": lambda rng, shape: rng.integers(-2, 3, shape).astype(float),
    "one far above": lambda rng, shape: rng.standard_normal(shape) + 50 * np.eye(*shape),
    "one far below": lambda rng, shape: rng.standard_normal(shape) - 50 * np.eye(*shape),
    "off center": lambda rng, shape: rng.standard_normal(shape) + 3.0,
    "far off center": lambda rng, shape: rng.standard_normal(shape) + 1e3,
    "all zero": lambda rng, shape: np.zeros(shape),
    "some rows zero": lambda rng, shape: (
        rng.standard_normal(shape) * (np.arange(shape[0]) % 2)[:, None]
    ),
    "rows of all scales": lambda rng, shape: (
        rng.standard_normal(shape) * np.geomspace(1e-5, 1e5, shape[0])[:, None]
    ),
}


GATES = {"default": Gate(), "paper": Gate.paper(), "wide": Gate(spread=3.0, eps=0.1)}


def exact(logits: np.ndarray, gate: Gate) -> np.ndarray:
    """Layer norm and entmax-1.5 by sorting (Peters et al. 2019, algorithm 2), in long doubles."""
    x = logits.astype(np.longdouble)
    x = x - x.mean(axis=1, keepdims=True)
    spread = np.longdouble(gate.spread_of(x.shape[1]))
    z = spread * x / np.sqrt((x * x).mean(axis=1, keepdims=True) + gate.eps) / 2
    z = z - z.max(axis=1, keepdims=True)
    order = -np.sort(-z, axis=1)
    count = np.arange(1, z.shape[1] + 1)
    mean = np.cumsum(order, axis=1) / count
    squares = np.cumsum(order * order, axis=1) - count * mean * mean
    tau = mean - np.sqrt(np.maximum((1 - squares) / count, 0))
    support = np.count_nonzero(tau <= order, axis=1)
    return np.maximum(z - np.take_along_axis(tau, support[:, None] - 1, 1), 0) ** 2


@pytest.mark.parametrize("shape", [(128, 128), (64, 1024), (300, 700)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GATES)
def test_coefficients_are_exact(
    name: str, kind: str, dtype: str, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    logits, gate = KINDS[kind](rng, shape).astype(dtype), GATES[name]
    found = activate(gate, logits).coefficients
    # layer norm of float32 logits that lie far off center loses digits in any way to compute it
    loose = 30 if kind == "far off center" else 1
    bound = loose * (4e-6 if dtype == "float32" else 1e-13)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, exact(logits, gate).astype(float), rtol=0, atol=bound)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=loose * bound)


def test_rows_with_an_unusual_root_are_exact(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((64, 1024))
    # many more entries near the top than normal rows have push the root down
    logits[::2, :100] = 2.2
    for gate in GATES.values():
        wanted = exact(logits, gate).astype(float)
        found = activate(gate, logits).coefficients
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["far off center", "one far above"])
def test_unusual_blocks_are_declined(kind: str, rng: np.random.Generator) -> None:
    logits = KINDS[kind](rng, (64, 1024))
    if kind == "one far above":
        logits[:, 3] = np.inf
    assert entmax15_of_rows(BACKEND, logits, LayerNorm(1e-5, 1.0)) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_infinities_and_nan_are_exact(bad: float, rng: np.random.Generator) -> None:
    logits = rng.standard_normal((64, 1024)).astype("float32")
    logits[7, 3] = bad
    if np.isnan(bad):
        with pytest.raises(GateError, match="NaN in row 7, expert 3"):
            activate(Gate(), logits)
        return
    found = activate(Gate(), logits).coefficients
    assert found[7, 3] == (1.0 if bad > 0 else 0.0)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-6)


def test_nothing_is_written_into_the_logits(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((64, 1024))
    logits.flags.writeable = False
    activate(Gate(), logits)
