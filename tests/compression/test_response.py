"""Measured responses of a loss: the function, its file, and who asks it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormoe.compression import Calibration, predicted_loss
from tensormoe.compression._predicted import lost, lost_to_second_order
from tensormoe.compression._response import Response
from tensormoe.compression._sharing import FORMS, loss_curve, shared
from tensormoe.errors import CheckpointError

sizes = st.floats(1e-6, 10.0)
points = st.lists(st.tuples(sizes, st.floats(-1.0, 50.0)), max_size=4).map(tuple)


@given(points, st.lists(sizes, min_size=2, max_size=6))
def test_larger_errors_never_do_less_nor_less_than_predicted(measured: Any, asked: Any) -> None:
    response = Response(measured)
    found = [response(each) for each in sorted(asked)]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(found))
    assert all(b >= a * (1 - 1e-9) for a, b in zip(sorted(asked), found, strict=True))
    assert response(0.0) == 0.0


def test_it_goes_through_what_was_measured() -> None:
    response = Response(((0.4, 1.6), (0.1, 0.2)))
    assert response(0.1) == pytest.approx(0.2)
    assert response(0.4) == pytest.approx(1.6)
    # a power between, the last ratio beyond, the prediction for small errors
    assert response(0.2) == pytest.approx(0.2 * 2**1.5)
    assert response(0.8) == pytest.approx(3.2)
    assert response(0.05) == pytest.approx(0.2 * 0.5**1.5)
    assert response(0.001) == 0.001
    # of one point a ratio, also below it
    assert Response(((0.1, 0.3),))(0.01) == pytest.approx(0.03)
    assert Response()(0.1) == 0.1


def test_noise_makes_no_absurd_responses() -> None:
    """Increases of small errors may be measured as negative, or as larger than those of others."""
    for measured in (((0.1, -0.3), (0.4, 0.8)), ((0.1, 0.0), (0.4, -1.0)), ((0.0, 0.5),)):
        response = Response(measured)
        for size in (0.01, 0.1, 0.2):
            assert size <= response(size) <= 2.0 * size + 1e-12
    # directions that no input has predict nothing, twice the same error tells nothing
    assert Response(((0.0, 0.5), (0.1, 0.2), (0.1, 0.9))).points == ((0.1, 0.2),)


def calibration() -> Calibration:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for layer in ("a", "b"):
        arrays |= {f"{layer}.counts": np.array([30, 20]), f"{layer}.weights": np.array([9.0, 8.0])}
        arrays[f"{layer}.squares"] = np.ones(2)
        for side, size in (("inputs", 6), ("hidden", 8)):
            rows = rng.standard_normal((50, size))
            arrays[f"{layer}.{side}"], arrays[f"{layer}.{side}.mean"] = rows.T @ rows, rows.sum(0)
        for role, size in (("gate_proj", 8), ("up_proj", 8), ("down_proj", 6)):
            rows = 0.1 * rng.standard_normal((50, size))
            arrays[f"{layer}.{role}.gradients"] = rows.T @ rows / 50
            arrays[f"{layer}.{role}.values"] = np.ones((2, 1))
    return Calibration(arrays, {"a": 40, "b": 40}, {})


def pairs(rows: int, columns: int, seed: int = 1) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [(m, 0.1 * m) for m in rng.standard_normal((2, rows, columns))]


HALVES = {
    "a.gate_proj.response": np.array([[0.1, 0.3], [1.0, 9.0]]),
    "a.up_proj.response": np.array([[0.1, 0.1], [3.0, 7.0]]),
}


def test_predictions_are_responses_to_what_was_predicted(tmp_path: Path) -> None:
    plain = calibration()
    known = replace(plain, arrays={**plain.arrays, **HALVES})
    assert not known.measured
    down = {f"{each}.down_proj.response": np.array([[0.1, 0.5]]) for each in "ab"}
    rest = {f"b.{each}.response": np.array([[0.1, 0.5]]) for each in ("gate_proj", "up_proj")}
    assert replace(known, arrays={**known.arrays, **down, **rest}).measured
    known.save(tmp_path / "c.safetensors")
    for each in (known, Calibration.load(tmp_path / "c.safetensors")):
        before = predicted_loss(plain, "a", "gate_proj", pairs(6, 8))
        assert before is not None
        wanted = Response(((0.1, 0.3), (1.0, 9.0)))(before)
        assert wanted > before
        assert predicted_loss(each, "a", "gate_proj", pairs(6, 8)) == pytest.approx(wanted)
        # errors of outputs, and projections that were not measured, are what they were
        assert lost(each, "a", "gate_proj", pairs(6, 8)).output_error == pytest.approx(
            lost(plain, "a", "gate_proj", pairs(6, 8)).output_error
        )
        for layer, role in (("a", "down_proj"), ("b", "gate_proj")):
            shape = (8, 6) if role == "down_proj" else (6, 8)
            same = [predicted_loss(e, layer, role, pairs(*shape)) for e in (each, plain)]
            assert same[0] == same[1]
        # of both halves as one, points of the same errors add up
        both = lost_to_second_order(plain, "a", "gate_up_proj", pairs(6, 16)).predicted_loss
        assert both is not None
        assert each.response("a", "gate_up_proj") == Response(((0.2, 0.4), (4.0, 16.0)))
        assert predicted_loss(each, "a", "gate_up_proj", pairs(6, 16)) == pytest.approx(
            Response(((0.2, 0.4), (4.0, 16.0)))(both)
        )


def test_curves_and_shares_follow() -> None:
    plain = calibration()
    response = np.array([[0.01, 0.5], [0.1, 8.0]])
    known = replace(plain, arrays={**plain.arrays, "a.gate_proj.response": response})
    stack = np.stack([matrix for matrix, _ in pairs(6, 8)])
    before, after = (loss_curve(stack, e, "a", "gate_proj", forms=FORMS) for e in (plain, known))
    wanted = known.response("a", "gate_proj")
    assert [(p.cost, p.label) for p in before] == [(p.cost, p.label) for p in after]
    np.testing.assert_allclose([p.loss for p in after], [wanted(p.loss) for p in before])
    other = loss_curve(stack, plain, "b", "gate_proj", itemsize=4)
    size, limit = {"a": stack.nbytes, "b": stack.nbytes}, stack.nbytes
    one, more = (
        shared({"a": loss_curve(stack, e, "a", "gate_proj"), "b": other}, size, limit)
        for e in (plain, known)
    )
    assert more["a"].nbytes > one["a"].nbytes
    assert more["b"].nbytes < one["b"].nbytes


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 2, 2)])
def test_arrays_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    plain = calibration()
    with pytest.raises(CheckpointError, match=r"a\.gate_proj\.response must fit"):
        replace(plain, arrays={**plain.arrays, "a.gate_proj.response": np.ones(shape)})
