"""Hypothesis strategies: layers of any size, and arrays that hide no mistake.

Arrays are drawn from a seeded generator rather than entry by entry: random entries find mistakes
in a contraction at once, and a failing example has to print its seed only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from tensormoe._spec import LayerSpec
from tensormoe.factorizations import (
    CP,
    BaseDelta,
    Dense,
    Factorization,
    Hadamard,
    LowRank,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe.gates import Gate

__all__ = [
    "batch_shapes",
    "coefficients",
    "dtypes",
    "factorizations",
    "factors",
    "gates",
    "inputs",
    "seeds",
    "sizes",
    "specs",
]

NDArray = npt.NDArray[Any]

_EXAMPLES: tuple[Factorization, ...] = (
    CP(1),
    TensorRing(1),
    TensorTrain(1),
    Tucker(1),
    LowRank(1),
    SharedBasis(1),
    BaseDelta(1),
    SharedDelta(1),
    Hadamard(),
    Dense(),
)


def seeds() -> st.SearchStrategy[int]:
    """Seeds of NumPy generators."""
    return st.integers(0, 2**32 - 1)


def sizes(largest: int = 6) -> st.SearchStrategy[int]:
    """Sizes of modes, 1 included."""
    return st.integers(1, largest)


def dtypes(names: Sequence[str] = ("float32", "float64")) -> st.SearchStrategy[str]:
    """Names of floating-point dtypes."""
    return st.sampled_from(tuple(names))


@st.composite
def factorizations(
    draw: st.DrawFn,
    levels: int,
    of: Factorization | None = None,
    largest_rank: int = 8,
) -> Factorization:
    """Factorizations for ``levels`` levels, with ranks from 1 to beyond any mode.

    Args:
        draw: given by Hypothesis.
        levels: E, the number of levels.
        of: a value of the only factorization to draw, whose own rank does not matter; all of the
            library's by default.
        largest_rank: the largest size of a bond.
    """
    example = draw(st.sampled_from(_EXAMPLES)) if of is None else of
    bonds = example.rank_pattern(levels)
    return example.with_rank(tuple(draw(st.integers(1, largest_rank)) for _ in bonds))


@st.composite
def specs(
    draw: st.DrawFn,
    of: Factorization | None = None,
    *,
    levels: int | None = None,
    bias: bool | None = None,
    largest: int = 6,
    largest_rank: int = 8,
) -> LayerSpec:
    """Layers of any factorization, one to three levels, with and without bias.

    Args:
        draw: given by Hypothesis.
        of: a value of the only factorization to draw; all of the library's by default.
        levels: the only number of levels; 1, 2 and 3 by default.
        bias: whether there is a bias; both by default.
        largest: the largest size of a mode; expert modes of three levels stay at 4.
        largest_rank: the largest size of a bond.
    """
    count = draw(st.integers(1, 3)) if levels is None else levels
    modes = sizes(largest if count < 3 else min(largest, 4))
    return LayerSpec(
        draw(sizes(largest)),
        draw(sizes(largest)),
        tuple(draw(modes) for _ in range(count)),
        draw(factorizations(count, of, largest_rank)),
        draw(st.booleans()) if bias is None else bias,
    )


def batch_shapes(largest: int = 5) -> st.SearchStrategy[tuple[int, ...]]:
    """Leading shapes of inputs: none, empty ones, one input, several axes."""
    edge = st.sampled_from([(), (1,), (0,), (2, 0), (1, 1)])
    return edge | st.lists(st.integers(1, largest), min_size=1, max_size=3).map(tuple)


@st.composite
def gates(draw: st.DrawFn, experts: Sequence[int], *, batch_norm: bool = False) -> Gate:
    """Gates for a layer: every activation and normalization, with and without bias.

    Args:
        draw: given by Hypothesis.
        experts: one size per level; top-k gates keep at most the smallest of them.
        batch_norm: whether to draw batch norm too, which mixes the inputs of a batch.
    """
    activation = draw(st.sampled_from(["entmax", "sparsemax", "softmax", "top_k", "relu_top_k"]))
    norms = ["layer", None, "batch"] if batch_norm else ["layer", None]
    options: dict[str, Any] = {}
    if activation == "entmax":
        options["alpha"] = draw(st.sampled_from([1.0, 1.25, 1.5, 1.75, 2.0, 3.0]))
    if activation.endswith("top_k"):
        options["k"] = draw(st.integers(1, min(experts)))
    options["normalization"] = norm = draw(st.sampled_from(norms))
    if norm is not None:
        options["spread"] = draw(st.sampled_from([None, 0.25, 1.0, 3.0]))
        options["eps"] = draw(st.sampled_from([1.0, 1e-5]))
    return Gate(activation, bias=draw(st.booleans()), **options)


@st.composite
def factors(draw: st.DrawFn, spec: LayerSpec, dtype: str = "float64") -> dict[str, NDArray]:
    """Standard normal factors, the bias included, by name."""
    rng = np.random.default_rng(draw(seeds()))
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in spec.shapes.items()}


@st.composite
def inputs(
    draw: st.DrawFn, features: int, batch_shape: tuple[int, ...], dtype: str = "float64"
) -> NDArray:
    """Standard normal inputs (..., features)."""
    rng = np.random.default_rng(draw(seeds()))
    return rng.standard_normal((*batch_shape, features)).astype(dtype)


@st.composite
def coefficients(
    draw: st.DrawFn, experts: Sequence[int], batch_shape: tuple[int, ...], dtype: str = "float64"
) -> list[NDArray]:
    """Coefficients that are random, sparse and different for each input.

    A mixture is linear in its coefficients, so nothing may depend on their being positive or
    summing to one, and these do neither. Every input uses at least one expert per level.

    Args:
        draw: given by Hypothesis.
        experts: one size per level.
        batch_shape: leading shape of the inputs.
        dtype: of the arrays.

    Returns:
        One array (..., N_e) per level.
    """
    rng = np.random.default_rng(draw(seeds()))
    found = []
    for count in experts:
        used = rng.random((*batch_shape, count)) < 0.5
        one = rng.integers(count, size=batch_shape)[..., None]
        used |= np.arange(count) == one
        found.append((rng.standard_normal((*batch_shape, count)) * used).astype(dtype))
    return found
