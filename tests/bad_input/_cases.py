"""What the tests of bad input share: small layers, arrays that fit them, and what a refusal is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tensormoe import CP, LayerSpec
from tensormoe.errors import TensormoeError
from tensormoe_numpy import MuMoE, MuMoEEmbedding

X = np.ones((3, 8), "float32")
IDS = np.array([0, 4, 8])

# what is called, error, what its message says in this order
Case = tuple[Callable[..., Any], type[TensormoeError], str]


def layer(**options: Any) -> MuMoE:
    return MuMoE(8, 4, 3, **({"factorization": "cp", "rank": 2} | options))


def tree(**options: Any) -> MuMoE:
    return MuMoE(8, 4, (3, 2), **({"factorization": "cp", "rank": 2} | options))


def table() -> MuMoEEmbedding:
    return MuMoEEmbedding(9, 4, 3, rank=2)


def spec() -> LayerSpec:
    return LayerSpec(8, 4, 3, CP(2))


def shares(*shape: int) -> np.ndarray:
    return np.ones(shape, "float32")


def assert_refused(call: Callable[[], Any], error: type[TensormoeError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error
    # the message stands alone: it is a sentence, and not a traceback of a framework
    assert str(caught.value).rstrip().endswith((".", "'", ")"))
