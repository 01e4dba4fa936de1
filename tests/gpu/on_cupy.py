"""CuPy on a GPU: the layers; the contract, and more of the layers, are in ``tests/cupy``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests._cupy_standin import ADAPTER, ON_DEVICE, device, host, installed
from tests.gpu._matching import DEVICE, Found, LayersMatch

cupy = pytest.importorskip("cupy")
tensormoe_cupy = pytest.importorskip("tensormoe_cupy")


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    with installed():
        yield


def test_the_device(record_testsuite_property: Callable[[str, object], None]) -> None:
    assert (DEVICE == "cuda") == ON_DEVICE
    name = "stand-in for CuPy"
    if ON_DEVICE:
        assert device(np.ones(3)).device.id >= 0
        name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    record_testsuite_property("device", name)
    record_testsuite_property("version", cupy.__version__)
    assert ADAPTER.name == "cupy"


class TestLayers(LayersMatch):
    def run(self, layer: Any, path: Path, arguments: list[Any], cotangent: np.ndarray) -> Found:
        ours = getattr(tensormoe_cupy, type(layer).__name__).load(path)
        output, pull = ours.vjp(*(device(each) for each in arguments))
        gradients = pull(device(cotangent))
        found = dict(gradients.parameters)
        if gradients.input is not None:
            found["x"] = gradients.input
        return host(output), host(found)
