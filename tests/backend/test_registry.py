"""NumPy keeps the contract of a backend, on read-only arrays too."""

from __future__ import annotations

import numpy as np
import pytest

from tensormoe import backend_of
from tensormoe.errors import BackendError
from tensormoe.testing import BackendContract
from tensormoe_numpy import BACKEND


class TestNumpy(BackendContract):
    backend = BACKEND

    def from_numpy(self, array: np.ndarray) -> np.ndarray:
        return array.copy()


class TestReadOnlyNumpy(BackendContract):
    """Nothing may write into what it is given."""

    backend = BACKEND

    def from_numpy(self, array: np.ndarray) -> np.ndarray:
        copy = array.copy()
        copy.flags.writeable = False
        return copy


def test_nothing_has_no_backend() -> None:
    with pytest.raises(BackendError, match="no arrays"):
        backend_of()
