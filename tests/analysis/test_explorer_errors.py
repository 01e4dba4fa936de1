"""Inputs that an exploration refuses, with the errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensormoe import LayerSpec
from tensormoe.analysis import Images, Table, Texts, Tokens, explore, explore_coefficients
from tensormoe.errors import CheckpointError, ShapeError, SpecError
from tensormoe_numpy import MuMoE, MuMoEEmbedding

X = np.ones((6, 4), "float32")
LAYER = MuMoE(4, 3, experts=2, rank=2, seed=0)
BARE = MuMoE(4, 3, experts=2, rank=2, gate=None, seed=0)
A = np.full((6, 2), 0.5)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"labels": [0, 1]}, ShapeError, "labels must be one per input; got 2 for 6"),
        ({"labels": [0] * 5 + [-1]}, ShapeError, r"labels must lie in .* got -1 at position 5"),
        ({"labels": [0.5] * 6}, ShapeError, "labels must be integers"),
        ({"labels": [0, 1, 2] * 2, "classes": 2}, ShapeError, "got 2 at position 2"),
        ({"class_names": ["a"], "classes": 2}, SpecError, "class_names must be one per class"),
        ({"class_names": "abc"}, SpecError, "class_names must be strings"),
        ({"class_names": ["a", 3]}, SpecError, "class_names must be strings"),
        ({"examples": Texts(["a"])}, ShapeError, "examples must be one per input; got 1 for 6"),
        ({"examples": ["a"] * 6}, SpecError, "examples must be Images, Texts, Tokens or Table"),
        ({"top": 0}, SpecError, "top must be a positive integer; got 0"),
        ({"top": True}, SpecError, "top must be a positive integer"),
        ({"title": 3}, SpecError, "title must be a string"),
        ({"threshold": "x"}, SpecError, "threshold must be a number"),
        ({"path": 3}, SpecError, "path must be a str or an os.PathLike of str; got 3"),
        ({"path": "experts.txt"}, SpecError, r"path must end in \.html or \.json"),
        ({"path": "nowhere/experts.html"}, SpecError, "the folder of path must exist"),
        ({"path": "a\0.html"}, SpecError, "null character"),
    ],
)
def test_options(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        explore_coefficients(A, **options)
    with pytest.raises(error, match=said):
        explore(LAYER, X, **options)


@pytest.mark.parametrize(
    ("layer", "options", "error", "said"),
    [
        (BARE, {}, SpecError, "coefficients must be given for a layer without a gate"),
        (3, {}, SpecError, "explore_coefficients"),
        (LAYER.config, {}, SpecError, "arrays must be given with a configuration"),
        (LAYER, {"arrays": {}}, SpecError, "arrays must be those of a configuration"),
        (LAYER.config, {"arrays": {"a": A}}, CheckpointError, "factors"),
        (LAYER, {"x": X.astype("float64")}, ShapeError, "x must have the layer's dtype"),
        (LAYER, {"coefficients": A > 0}, ShapeError, "must be real floating point; got bool"),
        (LAYER, {"x": X[:, :3]}, ShapeError, "x must end in an axis of 4 features"),
        (LAYER, {"coefficients": [A, A]}, ShapeError, "one entry per level, 1; got 2"),
        (
            LAYER,
            {"coefficients": A[:3]},
            ShapeError,
            r"inputs must be one per row of the coefficients, 3; got shape \(6, 4\)",
        ),
        (LAYER, {"coefficients": np.ones((6, 3))}, ShapeError, "an axis of 2 experts"),
        (LAYER, {"head": "logits"}, SpecError, "head must be a function or 'identity'"),
        (LAYER, {"head": lambda y: y[:, 0]}, ShapeError, r"logits must have shape \(6, classes\)"),
        (LAYER, {"head": "identity", "classes": 4}, ShapeError, "those of the 3 logits; got 4"),
        (LAYER, {"nearest": -1}, SpecError, "nearest must be a non-negative integer"),
        (MuMoEEmbedding(4, 3, experts=2, rank=2), {}, SpecError, "got an embedding"),
        (LayerSpec(4, 3, 2, "dense"), {}, SpecError, "layer must be a layer or block"),
    ],
)
def test_layers(layer: Any, options: dict[str, Any], error: type[Exception], said: str) -> None:
    options = {"head": "identity", **options}
    x = options.pop("x", X)
    with pytest.raises(error, match=said):
        explore(layer, x, **options)


@pytest.mark.parametrize(
    ("value", "said"), [(-0.5, "got -0.5 for expert 1"), (np.nan, "nan"), (np.inf, "inf")]
)
def test_coefficients_that_are_none(value: float, said: str) -> None:
    wrong = A.copy()
    wrong[3, 1] = value
    with pytest.raises(SpecError, match=rf"{said}.*input 3|{said}"):
        explore_coefficients(wrong)


def test_runs_and_levels() -> None:
    with pytest.raises(SpecError, match="run and inputs"):
        explore_coefficients(A, run=lambda x, a: x)
    with pytest.raises(SpecError, match="run must be a function"):
        explore_coefficients(A, run=3, inputs=A)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="at least one level"):
        explore_coefficients([])
    with pytest.raises(ShapeError, match="as many rows in every level"):
        explore_coefficients([A, A[:3]])
    with pytest.raises(ShapeError, match="experts must be one per level"):
        explore_coefficients([A, A], experts=[2])


def test_explorations_that_do_not_belong_together() -> None:
    one = explore_coefficients(A, [0] * 6, classes=2)
    with pytest.raises(ShapeError, match="the same class_names"):
        one + explore_coefficients(A, [0] * 6, classes=3)
    with pytest.raises(ShapeError, match="the same experts"):
        one + explore_coefficients(np.ones((6, 1)), [0] * 6, classes=2)
    with pytest.raises(ShapeError, match="all have labels"):
        one + explore_coefficients(A, class_names=["0", "1"])
    with pytest.raises(ShapeError, match="the same experts and top"):
        one + explore_coefficients(A, [0] * 6, classes=2, top=3)
    with pytest.raises(TypeError):
        one + 3  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: Images(np.zeros((3, 4))), ShapeError, "pixels must have shape"),
        (lambda: Images(np.zeros((3, 3, 8, 8))), ShapeError, "Move the channels"),
        (lambda: Images(np.zeros((3, 0, 4))), ShapeError, "at least one pixel"),
        (lambda: Images(np.full((3, 4, 4), 16.0)), SpecError, r"\[0, 1\].*Pass low and high"),
        (lambda: Images(np.full((3, 4, 4), np.nan)), SpecError, "got values from nan"),
        (lambda: Images(np.zeros((3, 4, 4)), 1.0, 1.0), SpecError, "low must be below high"),
        (lambda: Images([1]), ShapeError, r"got \(\)"),
        (lambda: Texts("abc"), ShapeError, "texts must be a list of strings"),
        (lambda: Texts(["a", 3]), ShapeError, "got 3 at position 1"),  # type: ignore[list-item]
        (lambda: Tokens("abc"), ShapeError, "a list of lists of tokens; got 'abc'"),
        (lambda: Tokens(["abc"]), ShapeError, r"texts\[0\] must be a list of strings"),
        (lambda: Table([[1, 2], [3]], ["a", "b"]), ShapeError, "at position 1"),
        (lambda: Table([[1]], "a"), ShapeError, "columns must be a list of strings"),
    ],
)
def test_examples(make: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make()


def test_no_file_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShapeError):
        explore_coefficients(A, [0], path=tmp_path / "a.html")
    assert not list(tmp_path.iterdir())
