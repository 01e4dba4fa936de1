"""Memory of second moments and their roots against what a plan says beforehand."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensormoe import LayerSpec, LowRank
from tensormoe.backend import get_backend
from tensormoe.compression import Calibration
from tensormoe.compression._effort import moments_needed
from tensormoe.decomposition._errors import moment_error
from tensormoe.decomposition._source import Source
from tensormoe.decomposition._weighted import weigh


def calibration_of(experts: int, rows: int, columns: int, apart: bool) -> Calibration:
    """Statistics of made-up rows of a down projection."""
    rng = np.random.default_rng(0)

    def moments(size: int) -> Any:
        x = rng.standard_normal((2 * size, size), dtype="float32")
        return x.T @ x / np.float32(len(x))

    ones = np.ones(experts)
    arrays = {"counts": 100 * ones, "weights": 50 * ones, "squares": 25 * ones}
    arrays |= {"hidden": moments(rows), "hidden.mean": np.zeros(rows, "float32")}
    arrays |= {"down_proj.values": np.zeros((experts, 4), "float32")}
    arrays |= {f"down_proj.{kind}": moments(columns) for kind in ("outputs", "gradients")}
    if apart:
        arrays["hidden.experts"] = np.stack([moments(rows) for _ in range(experts)])
        arrays["hidden.experts.mean"] = np.zeros((experts, rows), "float32")
    return Calibration({f"a.{name}": each for name, each in arrays.items()}, {"a": 100}, {})


@pytest.mark.parametrize(
    ("sizes", "weighting"),
    [
        ((3, 1100, 40), "inputs"),
        ((3, 40, 1100), "both"),
        ((3, 700, 600), "fisher"),
        ((8, 500, 40), "apart"),
    ],
)
def test_moments_take_no_more_than_the_plan_says(
    sizes: tuple[int, int, int], weighting: str, tmp_path: Path
) -> None:
    experts, rows, columns = sizes
    calibration_of(*sizes, weighting == "apart").save(tmp_path / "c.safetensors")
    spec = LayerSpec(rows, columns, (experts,), LowRank(2), bias=False)
    weights = np.random.default_rng(1).standard_normal(sizes).astype("float32")
    shapes = spec.shapes
    factors = {name: np.zeros(shape, "float32") for name, shape in shapes.items()}
    kind = "inputs" if weighting == "apart" else weighting
    tracemalloc.start()
    found = Calibration.load(tmp_path / "c.safetensors")
    moments = found.moments("a", "down_proj", kind)
    assert moments is not None
    assert moments.apart == (weighting == "apart")
    source = Source(weights, get_backend("numpy"))
    weighting_of = weigh(source, moments)
    weighting_of.source.squared_norm()
    weighting_of.undo(spec, factors)
    moment_error(spec, factors, source, moments, weighting_of)
    found.output_error("a", "down_proj", ((each, each) for each in weights))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    needed = moments_needed(spec, 4, weighting == "apart")
    assert peak <= needed
    # a bound that is worth something
    assert needed <= 4 * peak


def test_one_experts_moments_are_read_alone(tmp_path: Path) -> None:
    calibration_of(8, 300, 20, True).save(tmp_path / "c.safetensors")
    found = Calibration.load(tmp_path / "c.safetensors")
    tracemalloc.start()
    listed = found.inputs_of_experts("a", "down_proj")
    first = next(listed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * first.nbytes
    np.testing.assert_array_equal(first, found.arrays["a.hidden.experts"][0])
    np.testing.assert_array_equal(list(listed)[6], found.arrays["a.hidden.experts"][7])
