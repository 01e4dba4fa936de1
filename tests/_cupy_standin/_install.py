"""CuPy's layers on the stand-in, or on the device where the tests are told that there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tensormoe.backend import loaded_backend
from tests._cupy_standin._module import Special, Standin

tensormoe_cupy = pytest.importorskip("tensormoe_cupy")

ON_DEVICE = os.environ.get("TENSORMOE_TEST_DEVICE") == "cuda"
"""Whether the tests run on a GPU."""

ADAPTER = tensormoe_cupy.BACKEND if ON_DEVICE else tensormoe_cupy.CupyBackend(Standin(), Special())
"""What the tests run on: CuPy's adapter of the stand-in, or of CuPy."""

LAYERS = [each for each in vars(tensormoe_cupy).values() if hasattr(each, "backend")]
"""Classes of layers."""


@contextmanager
def installed() -> Iterator[None]:
    """The registry and the layers take :data:`ADAPTER` for CuPy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensormoe_cupy, "BACKEND", ADAPTER)
        for layer in LAYERS:
            patch.setattr(layer, "backend", ADAPTER)
        loaded_backend.cache_clear()
        yield
    loaded_backend.cache_clear()
