"""Arrays of a calibration: their names, shapes and parts."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

from tensormoe._validation import is_number
from tensormoe.compression._calibration_file import StoredArrays
from tensormoe.decomposition._moments import RIDGE
from tensormoe.errors import SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def fits(name: str, shape: tuple[int, ...], experts: int) -> bool:
    """Whether an array has a shape that its name allows."""
    if name in ("counts", "weights", "squares"):
        return shape == (experts,)
    lead = (experts,) if "experts" in name.split(".") else ()
    if name.endswith(".response"):
        return len(shape) == 2 and shape[1] == 2
    if name.endswith(".values"):
        return len(shape) == 2 and shape[0] == experts
    if name.endswith(".mean"):
        return shape[:-1] == lead
    return shape[:-2] == lead and len(shape) >= 2 and shape[-1] == shape[-2]


def checked_ridge(ridge: Any) -> float:
    """A ridge as a float.

    Raises:
        SpecError: not a positive number.
    """
    if not is_number(ridge) or not isfinite(ridge) or ridge <= 0:
        raise SpecError(f"ridge must be a positive number; got {ridge!r}. The usual: {RIDGE:g}.")
    return float(ridge)


def side_of(layer: str, role: str) -> str:
    return f"{layer}.{'hidden' if role == 'down_proj' else 'inputs'}"


def shape_of(arrays: Mapping[str, Any], key: str) -> tuple[int, ...]:
    if isinstance(arrays, StoredArrays):
        return arrays.shape(key)
    return tuple(arrays[key].shape)


def entry_of(arrays: Mapping[str, Any], key: str, place: int) -> NDArray[Any]:
    """One expert's part of an array; of a file, no more is read."""
    found: NDArray[Any] = (
        arrays.entry(key, place) if isinstance(arrays, StoredArrays) else arrays[key][place]
    )
    return found


def beside(blocks: list[NDArray[Any]]) -> NDArray[Any]:
    """A matrix of blocks on the diagonal."""
    import numpy as np

    sizes = [len(each) for each in blocks]
    whole = np.zeros((sum(sizes),) * 2)
    start = 0
    for block in blocks:
        stop = start + len(block)
        whole[start:stop, start:stop] = block
        start = stop
    return whole


def listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
