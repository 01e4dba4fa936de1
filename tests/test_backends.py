"""Backends keep the contract: NumPy, NumPy on read-only arrays, and one that a third party adds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import array_api_strict as strict
import numpy as np
import pytest

from tensormoe import _registry, available_backends, backend_of, get_backend, known_backends
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


class StrictBackend:
    """An adapter of array_api_strict, which has the Array-API standard and nothing else."""

    name = "array_api_strict"
    namespace = strict
    # an odd size, so that gates work on several blocks even where arrays are small
    row_block_bytes = 100
    eager = True
    checks_values = True
    picks_entries = False

    def owns(self, array: Any, /) -> bool:
        return isinstance(array, type(strict.asarray(0)))

    def matmul(self, left: Any, right: Any, /) -> Any:
        return strict.matmul(left, right)

    def reshape(self, array: Any, shape: tuple[int, ...], /) -> Any:
        return strict.reshape(array, shape)

    def permute(self, array: Any, axes: tuple[int, ...], /) -> Any:
        return strict.permute_dims(array, axes)

    def contiguous(self, array: Any, /) -> Any:
        return strict.asarray(array, copy=True)

    def sum(self, array: Any, axes: tuple[int, ...], /) -> Any:
        return strict.sum(array, axis=axes, dtype=array.dtype)

    def excess(self, array: Any, threshold: Any, /, out: Any = None) -> Any:
        difference = array - threshold
        return strict.maximum(difference, strict.zeros_like(difference))

    def row_sums(self, array: Any, /) -> Any:
        return strict.sum(array, axis=-1, keepdims=True)

    def square_sums(self, array: Any, /) -> Any:
        return strict.sum(array * array, axis=-1, keepdims=True)

    def take(self, array: Any, indices: Any, axis: int, /) -> Any:
        flat = strict.take(array, strict.reshape(indices, (-1,)), axis=axis)
        shape = (*array.shape[:axis], *indices.shape, *array.shape[axis + 1 :])
        return strict.reshape(flat, shape)

    def scatter_add(self, values: Any, indices: Any, axis: int, size: int, /) -> Any:
        # the standard has no scatter: a product with one-hot rows
        rows = strict.arange(size)[:, None] == strict.reshape(indices, (1, -1))
        before, after = values.shape[:axis], values.shape[axis + indices.ndim :]
        flat = strict.reshape(values, (*before, indices.size, *after))
        moved = strict.moveaxis(flat, axis, -1)[..., None]
        total = strict.matmul(strict.astype(rows, values.dtype), moved)[..., 0]
        return strict.moveaxis(total, -1, axis)

    def floats(self, array: Any, /) -> list[float]:
        return [float(array[place]) for place in range(array.shape[0])]

    def stop_gradient(self, array: Any, /) -> Any:
        return array

    def to_bytes(self, array: Any, /) -> tuple[str, tuple[int, ...], bytes]:
        return BACKEND.to_bytes(np.asarray(array))

    def from_bytes(self, dtype: str, shape: tuple[int, ...], data: bytes, /) -> Any:
        return strict.asarray(BACKEND.from_bytes(dtype, shape, data))


STRICT = StrictBackend()


@pytest.fixture(scope="module")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An installed distribution with an entry point, as a third party's would be."""
    site = tmp_path_factory.mktemp("site-packages")
    info = Path(site, "tensormoe_strict-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tensormoe-strict\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[tensormoe.backends]\narray_api_strict = {__name__}:STRICT\n"
        "no_such_library = no_such_adapter:BACKEND\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setitem(sys.modules, __name__, sys.modules[__name__])
        _clear_registry()
        yield
    _clear_registry()


def _clear_registry() -> None:
    _registry._entry_points.cache_clear()
    get_backend.cache_clear()


@pytest.mark.usefixtures("third_party")
class TestStrict(BackendContract):
    backend = STRICT

    def from_numpy(self, array: np.ndarray) -> Any:
        return strict.asarray(array.copy())


@pytest.mark.usefixtures("third_party")
def test_listed_is_not_usable() -> None:
    assert {"array_api_strict", "no_such_library", "numpy"} <= set(known_backends())
    assert "array_api_strict" in available_backends()
    assert "no_such_library" not in available_backends()


@pytest.mark.usefixtures("third_party")
def test_what_is_mixed_is_listed() -> None:
    with pytest.raises(BackendError, match=r"numpy\.ndarray at 0, array_api_strict\.Array at 1"):
        backend_of(np.ones(2), strict.ones(2))


def test_nothing_has_no_backend() -> None:
    with pytest.raises(BackendError, match="no arrays"):
        backend_of()
