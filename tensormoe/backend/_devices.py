"""The device of new arrays: that of the arrays they will meet."""

from __future__ import annotations

from typing import Any

from tensormoe.backend._protocol import Array


def device_of(array: Array) -> Any:
    """The ``device`` argument that puts a new array beside ``array``.

    ``None``, the library's own choice, for arrays that have no device, although the standard says
    so: JAX's while they are traced or lie on several devices, and all of Dask's; and for JAX's that
    are not committed to their device, since an array that is made for a device is.

    >>> import numpy as np
    >>> device_of(np.ones(3))
    'cpu'
    >>> device_of(object()) is None
    True
    """
    device = getattr(array, "device", None)
    # a layout over several devices fits no array of another shape
    if device is None or hasattr(device, "device_set"):
        return None
    return device if getattr(array, "committed", True) else None
