"""Dask joins through an entry point, with nothing changed here: lazy, and the same layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest

from tensormoe import get_backend
from tensormoe.testing import BackendContract
from tests._third_party import installed_package

# chunks of a few entries are no way to compute, but a way to test
pytestmark = pytest.mark.filterwarnings("ignore:Increasing number of chunks")


@pytest.fixture(scope="module", autouse=True)
def dask_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    site = tmp_path_factory.mktemp("site-packages")
    # threads cost more than they bring where arrays are small
    with installed_package("tensormoe-dask", site), dask.config.set(scheduler="synchronous"):
        yield


def chunked(array: np.ndarray) -> da.Array:
    """In two chunks along every axis of four entries or more."""
    chunks = tuple((size + 1) // 2 if size > 3 else size for size in array.shape)
    return da.from_array(array.copy(), chunks=chunks)


class TestDask(BackendContract):
    @property
    def backend(self) -> Any:
        return get_backend("dask")

    def from_numpy(self, array: np.ndarray) -> Any:
        return chunked(array)
