"""Layouts of TensorLy that do not fit are refused: nothing is cut off, broadcast or reordered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorly
from tensorly.cp_tensor import CPTensor
from tensorly.tr_tensor import TRTensor
from tensorly.tt_tensor import TTTensor
from tensorly.tucker_tensor import TuckerTensor

from tensormoe import (
    CP,
    Dense,
    Hadamard,
    LayerSpec,
    TensorRing,
    TensorTrain,
    Tucker,
    from_tensorly,
    to_tensorly,
)
from tensormoe.errors import BackendError, ShapeError
from tensormoe.testing import reconstruct_by_einsum

RNG = np.random.default_rng(0)


def draw(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    return [RNG.standard_normal(shape) for shape in shapes]


COLUMNS = draw((4, 3), (6, 3), (5, 3))
RING = draw((2, 4, 3), (3, 6, 2), (2, 5, 2))
TRAIN = draw((1, 4, 3), (3, 6, 2), (2, 5, 1))
CORE = draw((3, 3, 3))[0]
EYE = [*draw((4, 5), (6, 5)), np.eye(5)]

# what TensorLy itself takes, and its tensor
RIGHT: dict[str, tuple[Any, Any, Callable[[], Any]]] = {
    "cp": (CP(3), CPTensor((np.array([2.0, -1, 3]), COLUMNS)), lambda: tensorly.cp_to_tensor),
    "cp without weights": (CP(3), (None, COLUMNS), lambda: tensorly.cp_to_tensor),
    "hadamard": (Hadamard(), (RNG.standard_normal(5), EYE), lambda: tensorly.cp_to_tensor),
    "ring": (TensorRing((2, 3, 2)), TRTensor(RING), lambda: tensorly.tr_to_tensor),
    "train": (TensorTrain((3, 2)), TTTensor(TRAIN), lambda: tensorly.tt_to_tensor),
    "a train as a ring": (TensorRing((1, 3, 2)), TTTensor(TRAIN), lambda: tensorly.tt_to_tensor),
    "tucker": (Tucker(3), TuckerTensor((CORE, COLUMNS)), lambda: tensorly.tucker_to_tensor),
    "dense": (Dense(), draw((4, 6, 5))[0], lambda: np.asarray),
}


@pytest.mark.parametrize("case", RIGHT)
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_right_is_taken_whole(case: str, bias: bool) -> None:
    kind, given, read = RIGHT[case]
    found = from_tensorly(kind, given, bias=bias)
    np.testing.assert_allclose(reconstruct_by_einsum(kind, found), read()(given))


WRONG: dict[str, tuple[Any, Any, str]] = {
    # one slice was kept, silently
    "a ring as a train": (
        TensorTrain((3, 2)),
        TRTensor(RING),
        r"outer bonds of 1; got cores of shapes \(2, 4, 3\) and \(2, 5, 2\)\. .*TensorRing",
    ),
    "a train that is not closed": (TensorTrain((3, 2)), [RING[0], RING[1], TRAIN[2]], "outer bond"),
    # weights were broadcast
    "tucker as cp": (CP(3), TuckerTensor((CORE, COLUMNS)), r"weights .*\(3,\); got .*\(3, 3, 3\)"),
    "one weight": (CP(3), (np.ones(1), COLUMNS), r"weights .*\(3,\); got .*\(1,\)"),
    "weights of hadamard": (Hadamard(), (np.ones((6, 5)), EYE), r"weights .*\(5,\); got"),
    "cp as tucker": (Tucker(3), CPTensor((np.ones(3), COLUMNS)), "'core' must have shape"),
    "cp as a ring": (TensorRing(3), CPTensor((np.ones(3), COLUMNS)), "must be a list of arrays"),
    "an array as a ring": (TensorRing(3), draw((4, 3, 3))[0], "must be a list of arrays"),
    "an array as cp": (CP(3), draw((2, 3, 3))[0], r"must be \(weights, factors\)"),
    "factors alone as cp": (CP(3), COLUMNS, r"must be \(weights, factors\)"),
    "two of three alone": (CP(3), COLUMNS[:2], r"must be \(weights, factors\)"),
    # stacked
    "a list as dense": (Dense(), draw((6, 5), (6, 5)), "must be one array"),
    "a matrix as dense": (Dense(), draw((6, 5))[0], "at least 3 axes"),
    "two factors": (CP(3), (None, COLUMNS[:2]), "at least 3 factors"),
    "two cores": (TensorRing(3), RING[:2], "at least 3 factors"),
    "another rank": (CP(2), (None, COLUMNS), r"'expert_0' must have shape \(4, 2\).*\(4, 3\)"),
    "ranks that differ": (CP(3), (None, [*COLUMNS[:2], draw((5, 1))[0]]), "'output' must have"),
    "bonds that differ": (TensorRing((2, 3, 2)), [RING[0], draw((1, 6, 2))[0], RING[2]], "'input'"),
    "another ring": (TensorRing((2, 3, 4)), RING, "'input' must have shape"),
    "cores of a matrix": (TensorRing(3), COLUMNS, "'expert_0' must have 3 axes"),
    "another core": (Tucker(3), (draw((3, 3, 2))[0], COLUMNS), "'core' must have shape"),
    "a core of fewer modes": (Tucker(3), (draw((3, 3))[0], COLUMNS), "'core' must have shape"),
    "an empty mode": (CP(3), (None, [COLUMNS[0], np.ones((0, 3)), COLUMNS[2]]), "positive"),
    "dtypes": (CP(3), (None, [each.astype("f4") for each in COLUMNS[:1]] + COLUMNS[1:]), "dtype"),
    "weights of another dtype": (CP(3), (np.ones(3, "f4"), COLUMNS), "dtype"),
    "integers": (CP(3), (None, [np.ones(each.shape, int) for each in COLUMNS]), "floating"),
    "complex": (CP(3), (None, [each + 1j for each in COLUMNS]), "floating"),
}
MASKED = {
    "all": (None, [np.ma.masked_array(each, each > 0) for each in COLUMNS]),
    "one": (None, [*COLUMNS[:-1], np.ma.masked_array(COLUMNS[-1])]),
    "weights": (np.ma.masked_array(np.ones(3)), COLUMNS),
}


@pytest.mark.parametrize("case", MASKED)
def test_masks_are_refused(case: str) -> None:
    with pytest.raises(BackendError, match="masked"):
        from_tensorly(CP(3), MASKED[case], bias=False)


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str) -> None:
    kind, given, message = WRONG[case]
    with pytest.raises(ShapeError, match=message):
        from_tensorly(kind, given, bias=False)


@pytest.mark.parametrize("junk", [None, 3, "cp", {"a": 1}, [], [[]], object(), [None, [None] * 3]])
def test_no_arrays_are_refused(junk: Any) -> None:
    for kind in (CP(3), Hadamard(), TensorRing(3), TensorTrain(3), Tucker(3), Dense()):
        with pytest.raises((BackendError, ShapeError)):
            from_tensorly(kind, junk, bias=False)


def test_a_bias_needs_a_row() -> None:
    given = (None, [COLUMNS[0], np.ones((1, 3)), COLUMNS[2]])
    with pytest.raises(ShapeError, match="last row of the input mode is the bias"):
        from_tensorly(CP(3), given, bias=True)
    assert from_tensorly(CP(3), given, bias=False)["input"].shape == (1, 3)


def test_names_tell_factors_apart_not_their_order() -> None:
    levels = 11
    spec = LayerSpec(3, 4, (2,) * levels, CP(2))
    stored = {name: RNG.standard_normal(shape) for name, shape in spec.shapes.items()}
    # as a pytree has them: expert_10 before expert_2
    ordered = dict(sorted(stored.items()))
    _, arrays = to_tensorly(spec.factorization, ordered)
    for level in range(levels):
        np.testing.assert_array_equal(arrays[level], stored[f"expert_{level}"])


@pytest.mark.parametrize("kind", [CP(3), TensorRing(2), TensorTrain(2), Tucker(3), Hadamard()])
def test_factors_of_another_layer_are_refused(kind: Any) -> None:
    spec = LayerSpec(6, 5, (4, 2), kind)
    stored = {name: np.ones(shape) for name, shape in spec.shapes.items()}
    for wrong in (
        {name: array for name, array in stored.items() if name != "input"},
        stored | {"other": np.ones(3)},
        stored | {"input": stored["input"][..., :-1]},
        stored | {"bias": np.ones(7)},
        stored | {"input": stored["input"].astype("f4")},
    ):
        with pytest.raises(ShapeError):
            to_tensorly(kind, wrong)
    with pytest.raises(BackendError, match="masked"):
        to_tensorly(kind, stored | {"input": np.ma.masked_array(stored["input"])})
    assert to_tensorly(kind, stored)


def test_a_factorization_is_a_value() -> None:
    for kind in ("cp", CP, None):
        with pytest.raises(TypeError, match="factorization must be a value such as"):
            to_tensorly(kind, {"weight": np.ones((2, 3, 4))})  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="factorization must be a value such as"):
            from_tensorly(kind, np.ones((2, 3, 4)), bias=False)  # type: ignore[arg-type]
