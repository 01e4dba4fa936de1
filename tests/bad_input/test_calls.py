"""What no layer can be called with, in any library: error class, rule, value, remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("cupy")
pytest.importorskip("flax")
pytest.importorskip("equinox")

from tensormoe import TopK
from tensormoe.errors import BackendError, PlanError, ShapeError, TensormoeError
from tests._frameworks import everywhere
from tests.bad_input._libraries import LIBRARIES, Library, assert_refused_by

# what is called, error, what its message says in this order
Case = tuple[Callable[[Library], Any], type[TensormoeError], str]
CASES: dict[str, Case] = {
    # inputs
    "another number of features": (
        lambda a: a.layer()(a.ones(3, 7)),
        ShapeError,
        r"x must end in an axis of 8 features; got shape \(3, 7\). Check the layer's in_features",
    ),
    "no features at all": (
        lambda a: a.layer()(a.ones()),
        ShapeError,
        r"x must end in an axis of 8 features; got shape \(\)",
    ),
    "an input of the block": (
        lambda a: a.block()(a.ones(3, 7)),
        ShapeError,
        r"axis of 8 features; got shape \(3, 7\)",
    ),
    "coefficients of a wrong input": (
        lambda a: a.layer().coefficients(a.ones(3, 7)),
        ShapeError,
        r"axis of 8 features; got shape \(3, 7\)",
    ),
    "a list": (
        lambda a: a.layer()([[1.0] * 8]),
        BackendError,
        r"x must be an array of {name}.*; got builtins\.list. Convert it yourself",
    ),
    "nothing": (lambda a: a.layer()(None), BackendError, r"got builtins\.NoneType. Convert it"),
    "another library": (
        lambda a: a.layer()(a.foreign[0]),
        BackendError,
        r"x must be an array of {name}.*; got {foreign}. Convert it yourself",
    ),
    "another library for a block": (
        lambda a: a.block()(a.foreign[0]),
        BackendError,
        r"x must be an array of {name}.*; got {foreign}. Convert it yourself",
    ),
    "another dtype": (
        lambda a: a.layer()(a.ones(3, 8, dtype="float16")),
        ShapeError,
        r"x must have the layer's dtype {dtype}float32; got {dtype}float16. Cast the input",
    ),
    "integers": (
        lambda a: a.layer()(a.ones(3, 8, dtype="int32")),
        ShapeError,
        r"x must have the layer's dtype {dtype}float32; got {dtype}int32. Cast the input",
    ),
    # coefficients
    "coefficients of other experts": (
        lambda a: a.layer()(a.x(), a.ones(3, 4)),
        ShapeError,
        r"coefficients of level 0 must have shape \(3, 3\); got \(3, 4\). Their leading axes",
    ),
    "coefficients of other inputs": (
        lambda a: a.layer()(a.x(), a.ones(2, 3)),
        ShapeError,
        r"coefficients of level 0 must have shape \(3, 3\); got \(2, 3\)",
    ),
    "coefficients to broadcast": (
        lambda a: a.layer()(a.x(), a.ones(3)),
        ShapeError,
        r"coefficients of level 0 must have shape \(3, 3\); got \(3,\)",
    ),
    "coefficients of too few levels": (
        lambda a: a.tree()(a.x(), a.ones(3, 3)),
        ShapeError,
        "coefficients must have one array per level, 2; got 1",
    ),
    "coefficients of too many levels": (
        lambda a: a.layer()(a.x(), [a.ones(3, 3), a.ones(3, 2)]),
        ShapeError,
        "coefficients must have one array per level, 1; got 2",
    ),
    "no level at all": (
        lambda a: a.layer()(a.x(), ()),
        ShapeError,
        "coefficients must have one array per level, 1; got 0",
    ),
    "coefficients of no array": (
        lambda a: a.tree()(a.x(), [a.ones(3, 3), [[1.0, 2.0]]]),
        BackendError,
        r"coefficients of level 1 must be an array of {name}.*; got builtins\.list",
    ),
    "coefficients of another library": (
        lambda a: a.layer()(a.x(), a.foreign[0]),
        BackendError,
        r"coefficients of level 0 must be an array of {name}.*; got {foreign}",
    ),
    "indices of another library": (
        lambda a: a.layer()(a.x(), TopK(a.foreign[0], a.ones(3, 1))),
        BackendError,
        "coefficients of level 0 must be an array of {name}",
    ),
    "a number for coefficients": (
        lambda a: a.layer()(a.x(), 3),
        BackendError,
        r"coefficients of level 0 must be an array of {name}.*; got builtins\.int",
    ),
    "whole coefficients": (
        lambda a: a.layer()(a.x(), a.ones(3, 3, dtype="int32")),
        ShapeError,
        r"coefficients of level 0 must be real floating point; got {dtype}int32. Cast them",
    ),
    "dense and indexed coefficients": (
        lambda a: a.tree()(a.x(), [a.chosen(), a.ones(3, 2)]),
        ShapeError,
        "all levels must be dense, or all indexed with one k; got a mixture",
    ),
    "levels of several k": (
        lambda a: a.tree()(a.x(), [a.chosen(), a.chosen(k=2)]),
        ShapeError,
        "all levels must be dense, or all indexed with one k; got a mixture",
    ),
    "half an expert": (
        lambda a: a.layer()(a.x(), TopK(a.ones(3, 1), a.ones(3, 1))),
        ShapeError,
        r"must be integers; got {dtype}float32. Cast them",
    ),
    "indices without values": (
        lambda a: a.layer()(a.x(), TopK(a.chosen(k=2).indices, a.ones(3, 1))),
        ShapeError,
        "coefficients of level 0 must have shape",
    ),
    "more kept than there are": (
        lambda a: a.layer()(a.x(), a.chosen(k=5)),
        PlanError,
        "top_k must be at most the experts of each level; got 5 for level 0 of 3. Lower k",
    ),
    "coefficients from nowhere": (
        lambda a: a.layer(gate=None)(a.x()),
        ShapeError,
        "this layer has no gate; got no coefficients. Call it with coefficients",
    ),
    "coefficients of no gate": (
        lambda a: a.layer(gate=None).coefficients(a.x()),
        ShapeError,
        "this (layer|block) has no gate; got no coefficients. Call it with coefficients",
    ),
    "coefficients of no block's gate": (
        lambda a: a.block(gate=None)(a.x()),
        ShapeError,
        "this (layer|block) has no gate; got no coefficients. Call it with coefficients",
    ),
    # ids
    "ids that are no integers": (
        lambda a: a.table()(a.ones(3), a.ones(3, 3)),
        ShapeError,
        r"ids must be integers; got {dtype}float32. Cast them",
    ),
    "ids that are flags": (
        lambda a: a.table()(a.ones(3, dtype="bool"), a.ones(3, 3)),
        ShapeError,
        r"ids must be integers; got {dtype}bool",
    ),
    "ids of another library": (
        lambda a: a.table()(a.foreign[0], a.ones(3, 3)),
        BackendError,
        r"ids must be an array of {name}.*; got {foreign}. Convert",
    ),
    "one id as a number": (
        lambda a: a.table()(3, a.ones(3)),
        BackendError,
        r"ids must be an array of {name}.*; got builtins\.int. Convert",
    ),
    # single experts, costs
    "an expert beyond the last": (
        lambda a: a.layer().expert(3),
        ShapeError,
        r"expert index must lie in \[0, 3\) at level 0; got 3",
    ),
    "a negative expert": (
        lambda a: a.tree().expert(0, -1),
        ShapeError,
        r"expert index must lie in \[0, 2\) at level 1; got -1",
    ),
    "an expert of another depth": (
        lambda a: a.layer().expert(0, 0),
        ShapeError,
        r"an expert has one index per level, 1; got \(0, 0\)",
    ),
    "an expert by name": (
        lambda a: a.layer().expert("first"),
        ShapeError,
        "expert index must lie in .* at level 0; got 'first'",
    ),
    "a negative batch": (
        lambda a: a.layer().cost(-1),
        PlanError,
        "batch must be a non-negative integer; got -1",
    ),
}
OF_VALUES: dict[str, Case] = {
    "an expert that is not there": (
        lambda a: a.layer()(a.x(), a.chosen(3)),
        ShapeError,
        r"indices of coefficients must lie in \[0, 3\); got 3",
    ),
    "an expert before the first": (
        lambda a: a.layer()(a.x(), a.chosen(-1)),
        ShapeError,
        r"must lie in \[0, 3\); got -1",
    ),
    "an id beyond the vocabulary": (
        lambda a: a.table()(a.ids(1, 9), a.ones(2, 3)),
        ShapeError,
        r"ids must lie in \[0, 9\); got 9. Check the size they index",
    ),
    "a negative id": (
        lambda a: a.table()(a.ids(-1), a.ones(1, 3)),
        ShapeError,
        r"ids must lie in \[0, 9\); got -1",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def libraries() -> Iterator[None]:
    with everywhere():
        yield


@pytest.mark.parametrize("name", [*CASES, *OF_VALUES])
@pytest.mark.parametrize("library", LIBRARIES, ids=str)
def test_bad_input(library: Library, name: str) -> None:
    if name in OF_VALUES and not library.values_are_seen:
        pytest.skip("values of a device are not waited for")
    call, error, message = (CASES | OF_VALUES)[name]
    assert_refused_by(library, lambda: call(library), error, message)
