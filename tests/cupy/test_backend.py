"""CuPy's adapter keeps the contract, on a strict stand-in or on the device that there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tensormoe.testing import BackendContract
from tests._cupy_standin import ADAPTER, installed


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    with installed():
        yield


class TestCupy(BackendContract):
    backend = ADAPTER

    def from_numpy(self, array: np.ndarray) -> Any:
        return ADAPTER.module.asarray(array)

    def to_numpy(self, array: Any) -> np.ndarray:
        return ADAPTER.module.asnumpy(array)


def test_half_precision() -> None:
    """The primitives of a layer in float16; tests with its coarse rounding have no bounds."""
    rng = np.random.default_rng(0)
    xp = ADAPTER.module
    left, right = rng.standard_normal((3, 4, 5)), rng.standard_normal((5, 6))
    narrow = [xp.asarray(array.astype("float16")) for array in (left, right)]
    places = np.array([[0, 2], [2, 2]])
    found = {
        "matmul": (ADAPTER.matmul(*narrow), left @ right),
        "sum": (ADAPTER.sum(narrow[0], (0, 2)), left.sum((0, 2))),
        "row sums": (ADAPTER.row_sums(narrow[1]), right.sum(1, keepdims=True)),
        "square sums": (ADAPTER.square_sums(narrow[1]), (right**2).sum(1, keepdims=True)),
        "take": (ADAPTER.take(narrow[1], xp.asarray(places), 1), right[:, places]),
        "scatter": (
            ADAPTER.scatter_add(narrow[0][:2, :2], xp.asarray(places), 0, 3),
            np.stack([left[0, 0], 0 * left[0, 0], left[0, 1] + left[1, 0] + left[1, 1]]),
        ),
    }
    for name, (got, want) in found.items():
        host = ADAPTER.to_host(got)
        assert (host.dtype.name, host.shape) == ("float16", want.shape), name
        np.testing.assert_allclose(host, want, rtol=0, atol=2e-2, err_msg=name)
