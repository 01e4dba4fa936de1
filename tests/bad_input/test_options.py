"""What no layer can be built with or loaded from, in any library: error, rule, value, remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("cupy")
pytest.importorskip("flax")
pytest.importorskip("equinox")

from tensormoe import CP, Gate
from tensormoe.errors import (
    BudgetError,
    CheckpointError,
    GateError,
    RankError,
    SpecError,
    TensormoeError,
)
from tests._frameworks import everywhere
from tests.bad_input._libraries import LIBRARIES, Library, assert_refused_by


def saved(folder: Path, layer: Any) -> Path:
    layer.save(folder / "layer")
    return folder / "layer"


# what is called with a folder, error, what its message says in this order
Case = tuple[Callable[[Library, Path], Any], type[TensormoeError], str]
CASES: dict[str, Case] = {
    "no inputs": (
        lambda a, _: a.package.MuMoE(0, 4, 3, rank=2, **a.random()),
        SpecError,
        "in_features must be a positive integer; got 0",
    ),
    "unknown factorization": (
        lambda a, _: a.layer(factorization="cpd"),
        SpecError,
        "factorization must be one of 'cp', 'tensor_ring', .*'dense'; got 'cpd'",
    ),
    "a class of something else": (
        lambda a, _: a.layer(factorization=dict),
        SpecError,
        "must be a subclass of tensormoe.Factorization; got <class 'dict'>",
    ),
    "three layers in a block": (
        lambda a, _: a.block(factorization=(CP(1), CP(2), CP(3)), rank=None),
        SpecError,
        "factorization must be one, or one per layer; got 3",
    ),
    "rank and budget": (
        lambda a, _: a.layer(budget=100),
        RankError,
        "rank and budget exclude one another; got rank=2 and budget=100. Drop one",
    ),
    "two ranks": (
        lambda a, _: a.layer(factorization=CP(2)),
        RankError,
        r"rank must be given once; got rank=2 beside CP\(rank=2\). Drop one",
    ),
    "an impossible budget": (
        lambda a, _: a.layer(rank=None, budget=3),
        BudgetError,
        "must be at least .* for cp.*; got 3. Raise",
    ),
    "bias in words": (
        lambda a, _: a.layer(bias="yes"),
        SpecError,
        "bias must be True or False; got 'yes'",
    ),
    "integers to train": (lambda a, _: a.layer(dtype="int32"), SpecError, "dtype must.*; got 'int"),
    "unknown gate": (
        lambda a, _: a.layer(gate="relu"),
        GateError,
        "activation must be one of entmax, .*; got 'relu'",
    ),
    "a top-k gate of too few experts": (
        lambda a, _: a.layer((3, 2), gate=Gate("top_k", k=3)),
        SpecError,
        "k of a top-k gate must be at most.*; got 3 for level 1 of 2. Lower k",
    ),
    "unknown initialization": (
        lambda a, _: a.layer(init="xavier"),
        SpecError,
        "init must be one of 'variance', 'paper'; got 'xavier'",
    ),
    "unknown initialization of a block": (
        lambda a, _: a.block(init="xavier"),
        SpecError,
        "init must be one of 'variance', 'paper'; got 'xavier'",
    ),
    "unknown activation": (
        lambda a, _: a.block(act_layer="mish"),
        SpecError,
        "act_layer must be one of 'gelu', .*; got 'mish'",
    ),
    "a class of no activation": (
        lambda a, _: a.block(act_layer=int),
        SpecError,
        "act_layer must be one of 'gelu', .*; got <class 'int'>",
    ),
    "gated by a number": (
        lambda a, _: a.block(gated=1),
        SpecError,
        "gated must be True or False; got 1",
    ),
    "everything dropped": (
        lambda a, _: a.block(drop=1.0),
        SpecError,
        r"drop must be in \[0, 1\); got 1\.0. Give the share",
    ),
    "less than nothing dropped": (
        lambda a, _: a.block(drop=-0.1),
        SpecError,
        r"drop must.*got -0\.1",
    ),
    "NaN dropped": (lambda a, _: a.block(drop=float("nan")), SpecError, "drop must be in.*got nan"),
    "no file": (
        lambda a, folder: a.package.MuMoE.load(folder / "none"),
        CheckpointError,
        "path must name an existing checkpoint; there is none at '.*none'",
    ),
    "a folder that is missing": (
        lambda a, folder: a.layer().save(folder / "none" / "layer"),
        CheckpointError,
        "none",
    ),
    "a layer for a block": (
        lambda a, folder: a.package.MuMoEMLP.load(saved(folder, a.layer())),
        CheckpointError,
        r"the file must hold a MuMoEMLP; got a MuMoE. Open it with MuMoE\.load",
    ),
    "a block for a layer": (
        lambda a, folder: a.package.MuMoE.load(saved(folder, a.block())),
        CheckpointError,
        r"the file must hold a MuMoE; got a MuMoEMLP. Open it with MuMoEMLP\.load",
    ),
    "a table for a layer": (
        lambda a, folder: a.package.MuMoE.load(saved(folder, a.table())),
        CheckpointError,
        r"the file must hold a MuMoE; got a MuMoEEmbedding",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def libraries() -> Iterator[None]:
    with everywhere():
        yield


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("library", LIBRARIES, ids=str)
def test_bad_options(library: Library, name: str, tmp_path: Path) -> None:
    call, error, message = CASES[name]
    assert_refused_by(library, lambda: call(library, tmp_path), error, message)
