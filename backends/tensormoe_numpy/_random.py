"""Sources of a layer's initial values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tensormoe import functional
from tensormoe._validation import brief, non_negative_int
from tensormoe.backend import Array
from tensormoe.errors import SpecError
from tensormoe.functional import LayerConfig
from tensormoe.mixtures import MixtureConfig, initialize_mixture
from tensormoe_numpy._adapter import BACKEND
from tensormoe_numpy._like_numpy import NumpyLikeBackend

FLOATS = ("float16", "float32", "float64")


def checked_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """``dtype`` if a layer can be stored in it.

    Raises:
        SpecError: not a floating-point type of NumPy's.
    """
    try:
        # NumPy reads None as float64
        found = None if dtype is None else np.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if found is None or found.name not in FLOATS:
        raise SpecError(f"dtype must be one of {', '.join(FLOATS)}; got {brief(dtype)}.")
    return found


def checked_generator(seed: int | np.random.Generator | None) -> np.random.Generator:
    """A generator from a seed, or the one given.

    Raises:
        SpecError: neither a seed nor a generator.
    """
    if seed is None or isinstance(seed, np.random.Generator):
        return np.random.default_rng(seed)
    try:
        # NumPy takes more, and a matrix ends the process
        return np.random.default_rng(non_negative_int(seed, "seed"))
    except SpecError:
        raise SpecError(
            f"seed must be a non-negative integer or a NumPy generator; got {seed!r}."
        ) from None


def draw(
    config: LayerConfig | MixtureConfig,
    dtype: np.dtype[Any],
    seed: int | np.random.Generator | None,
    init: str,
    backend: NumpyLikeBackend,
) -> dict[str, Array]:
    """Parameters and buffers of a new layer by canonical name.

    They are drawn in float64 and on the host: a seed means one thing in all dtypes and libraries.
    """
    backend.check_device()
    generator: Any = checked_generator(seed)
    draws: dict[str, Any] = {
        "normal": lambda shape: generator.standard_normal(shape).astype(dtype),
        "uniform": lambda shape: generator.uniform(-1.0, 1.0, shape).astype(dtype),
        "zeros": lambda shape: np.zeros(shape, dtype),
    }
    if isinstance(config, MixtureConfig):
        arrays = initialize_mixture(config, BACKEND, init=init, **draws)
    else:
        arrays = functional.initialize(config, BACKEND, init=init, **draws)
    width = np.dtype("float32") if dtype.itemsize < 4 else dtype
    for name, shape in config.buffer_shapes().items():
        arrays[name] = (np.ones if "variance" in name else np.zeros)(shape, width)
    return {name: backend.from_host(array) for name, array in arrays.items()}
