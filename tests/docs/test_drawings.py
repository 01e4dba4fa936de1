"""The drawings of networks: those that are committed, and true to the factorizations."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Factorization,
    Hadamard,
    LayerSpec,
    LowRank,
    SharedBasis,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe.factorizations import Slice

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def drawings() -> Iterator[ModuleType]:
    spec = spec_from_file_location("_drawings", DOCS / "_drawings.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # dataclasses look up their module by name
        patch.setitem(sys.modules, "_drawings", module)
        spec.loader.exec_module(module)
        yield module


def test_committed(drawings: ModuleType) -> None:
    """``python docs/_drawings.py`` would change nothing."""
    for name, draw in drawings.DRAWINGS.items():
        assert (DOCS / "images" / f"{name}.svg").read_text("utf-8") == draw().svg(), name


NETWORKS = {
    "cp": CP(4),
    "tensor-ring": TensorRing((2, 2, 4)),
    "tensor-train": TensorTrain((2, 4)),
    "tucker": Tucker((2, 4, 4)),
    "hadamard": Hadamard(),
    "low-rank": LowRank(4),
    "shared-basis": SharedBasis((2, 4)),
    "base-delta": BaseDelta(2),
    "dense": Dense(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_true_to_the_network(drawings: ModuleType, name: str) -> None:
    """As many arrays, and the same legs at each of them, as the layer has."""
    network = LayerSpec(9, 8, 7, NETWORKS[name], bias=False).network
    drawn = drawings.DRAWINGS[f"network-{name}"]()
    assert sorted(legs_drawn(drawn)) == sorted(len(factor.legs) for factor in network.factors)


def legs_drawn(drawn: object) -> list[int]:
    """The number of lines that end in each circle or box."""
    counts = {place: 0 for key, place in drawn.places.items() if key not in drawn.dots}  # type: ignore[attr-defined]
    for ends in drawn.ends:  # type: ignore[attr-defined]
        for place in ends:
            if place in counts:
                counts[place] += 1
    return list(counts.values())


def test_every_factorization_is_drawn() -> None:
    drawn = {type(value) for value in NETWORKS.values()}
    every = Factorization.__subclasses__()
    ours = {each for each in every if each.__module__.startswith("tensormoe.")}
    # a factorization that extends another one is a variant of it, and a slice is a part of any
    assert ours - {Slice} == drawn
