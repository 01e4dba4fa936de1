"""Public functions of the explorer of experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tensormoe.analysis import (
    Exploration,
    Images,
    Table,
    Texts,
    Tokens,
    explore,
    explore_coefficients,
    neuronpedia_batches,
)
from tensormoe_numpy import MuMoE
from tests.fuzz._doors import Door

X = np.ones((3, 8), "float32")
A = np.eye(3, dtype="float32")


def doors() -> Iterator[Door]:
    yield Door("Images", Images, lambda: dict(pixels=np.ones((3, 2, 2)), low=0, high=1, size=9))
    yield Door("Texts", _shown(Texts), lambda: dict(texts=["a", "b", "c"]))
    yield Door("Tokens", _shown(Tokens), lambda: dict(texts=[["a", "b"], ["c"]], window=1))
    yield Door("Table", _shown(Table), lambda: dict(rows=[[1], [2], ["c"]], columns=["d"]))
    options = dict(
        labels=[0, 1, 1],
        examples=Texts(["a", "b", "c"]),
        class_names=["x", "y"],
        top=2,
        threshold=0.1,
        title="t",
        path=None,
    )
    yield Door(
        "explore_coefficients",
        # functions of the caller's may fail as they like
        lambda **given: explore_coefficients(run=lambda x, a: a[0][:, :2], **given),
        lambda: {**options, **dict(coefficients=A, experts=None, classes=2, inputs=A)},
    )
    layer = MuMoE(8, 2, 3, rank=2, seed=0)
    yield Door(
        "explore",
        lambda **given: explore(head="identity", **given),
        lambda: {**options, **dict(layer=layer, x=X, arrays=None, coefficients=A, nearest=2)},
    )
    found = explore_coefficients(A, examples=Tokens([["a", "b"], ["c"]], 1))
    yield Door("Exploration.save", found.save, lambda: dict(path="found.json"))
    yield Door("Exploration.load", Exploration.load, lambda: dict(path="found.json"))
    yield Door(
        "neuronpedia_batches",
        neuronpedia_batches,
        lambda: dict(found=found, model_id="m", layer=0, source_set="s", level=0, batch=2),
    )


def _shown(kind: Any) -> Any:
    """Inputs, and an exploration that shows them."""

    def made(**options: Any) -> Any:
        return explore_coefficients(A, examples=kind(**options)).html()

    return made
