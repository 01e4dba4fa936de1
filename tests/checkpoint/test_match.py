"""How arrays fit a block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tensormoe.checkpoint import match_arrays, peek_checkpoint, save_checkpoint
from tensormoe.errors import CheckpointError
from tests._checkpoint_files import some_arrays


def test_match_of_equal_names_and_shapes() -> None:
    found = some_arrays()
    match = match_arrays({name: array.shape for name, array in found.items()}, found)
    assert match.exact
    assert match.describe() == ""
    assert all(match.arrays[name] is array for name, array in found.items())


def test_strict_match_lists_every_difference() -> None:
    expected = {"a": (2,), "b": (3, 4), "c": (), "d": (5,)}
    found = {"a": np.zeros(2), "b": np.zeros((4, 3)), "d": np.zeros((5, 1)), "e": np.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        match_arrays(expected, found)
    assert str(caught.value).splitlines()[1:] == [
        "'c' () is missing",
        "'e' (1,) is unexpected",
        "'b' must have the shape (3, 4); got (4, 3)",
        "'d' must have the shape (5,); got (5, 1)",
    ]
    match = match_arrays(expected, found, strict=False)
    assert not match.exact
    assert list(match.arrays) == ["a"]
    assert match.arrays["a"] is found["a"]
    assert match.missing == {"c": ()}
    assert match.unexpected == {"e": (1,)}
    assert match.mismatched == {"b": ((3, 4), (4, 3)), "d": ((5,), (5, 1))}
    assert str(caught.value).endswith(match.describe())


def test_match_before_loading(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", "MuMoE", {}, some_arrays())
    header = peek_checkpoint(tmp_path / "a")
    shapes = {name: array.shape for name, array in some_arrays().items()}
    assert match_arrays(shapes, header.arrays).exact


def test_arrays_without_a_shape_are_refused() -> None:
    with pytest.raises(CheckpointError, match="array 'x' must have a shape; got 1"):
        match_arrays({"x": (1,)}, {"x": 1})
