"""Arrays from one library to another, because somebody asked for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

from tensormoe.backend._protocol import Array, Backend, Exchange
from tensormoe.backend._registry import backend_of, get_backend
from tensormoe.errors import BackendError

# what libraries raise that can't lend an array, or can't take it
_REFUSALS = (AttributeError, BufferError, TypeError, ValueError, RuntimeError)


@overload
def convert(
    arrays: Mapping[str, Array], library: str, *, copy: bool | None = None
) -> dict[str, Array]: ...


@overload
def convert(arrays: Array, library: str, *, copy: bool | None = None) -> Array: ...


def convert(
    arrays: Array | Mapping[str, Array], library: str, *, copy: bool | None = None
) -> Array | dict[str, Array]:
    """Arrays of any library as those of another one, in the same memory where that can be.

    Libraries share memory through `DLPack <https://dmlc.github.io/dlpack/latest/>`_: then nothing
    is copied, whatever the size, and what one side writes the other sees. Where they cannot, the
    values are copied. That is so for strides or alignments that a library does not have; and for
    memory that its library holds constant (all of JAX's, and NumPy's read-only arrays) where the
    other one has no read-only arrays (PyTorch and CuPy; NumPy gets a read-only one). JAX takes
    what it is lent for constant as well: copy an array that is written to afterwards.

    Arrays stay on their device, which the other library must see; but NumPy's are always in host
    memory and CuPy's always on a GPU, so values go there and back.

    A layer moves with its arrays: ``restore`` makes it of those of its own framework.

    Args:
        arrays: an array, or arrays by name.
        library: name of the backend that the result belongs to, e.g. ``"torch"``.
        copy: True for memory of the result's own; False to share it or to fail, even where the
            other side could then write to constants.

    Returns:
        An array of the same shape, dtype and values; or such arrays by the same names.

    Raises:
        BackendError: no array of a known library, or one that cannot go over as it is: traced,
            differentiated, of a dtype that the other library lacks, or on a device that it does
            not see; or memory that cannot be shared, with ``copy=False``.
        MissingDependencyError: the library is not installed.

    >>> import numpy as np
    >>> from tensormoe import convert
    >>> x = np.zeros((2, 3))
    >>> there = convert(x, "torch")
    >>> there[0, 0] = 7.0
    >>> x[0, 0]
    np.float64(7.0)
    >>> convert({"x": x}, "torch", copy=True)["x"].shape
    torch.Size([2, 3])

    >>> import tensormoe_numpy, tensormoe_torch
    >>> layer = tensormoe_numpy.MuMoE(6, 4, experts=3, rank=2, seed=0)
    >>> arrays = convert(layer.arrays, "torch", copy=True)
    >>> tensormoe_torch.MuMoE.restore(layer.config, arrays).factors["input"].shape
    torch.Size([6, 2])
    """
    if copy is not None and not isinstance(copy, bool):
        raise BackendError(f"copy must be True, False or None; got {copy!r}. Leave it out.")
    target = get_backend(library)
    if isinstance(arrays, Mapping):
        return {name: _convert(array, repr(name), target, copy) for name, array in arrays.items()}
    return _convert(arrays, "the array", target, copy)


def _convert(array: Array, name: str, target: Backend, copy: bool | None) -> Array:
    try:
        source = backend_of(array)
    except BackendError as error:
        raise BackendError(f"{name} must be an array of a known library: {error}") from error
    if source.name == target.name and not copy:
        return array
    refusal: Exception | None = None
    # what can't be shared as it is may be copied, unless that is ruled out or was asked for
    for copied in (False, True) if copy is None else (copy,):
        try:
            lent, writable = _lend(source, array, copy=copied)
            if source.name == target.name:
                return lent
            if copy is None and not writable and not _keeps_constants(target):
                continue
            if _is_elsewhere(lent, target):
                if copy is False:
                    raise BufferError(f"{target.name} has no arrays on its device")
                return target.from_bytes(*source.to_bytes(lent))
            return _borrow(target, lent, copy=copied or copy)
        except BackendError as error:
            raise BackendError(f"{name}: {error}") from error
        except _REFUSALS as error:
            refusal = refusal or error
    device = getattr(array, "device", "of its own")
    ways = ", allow a copy," if copy is False else ""
    raise BackendError(
        f"{name} must be an array that {target.name} can take from {source.name}; got "
        f"{array.dtype} of shape {tuple(array.shape)}, device {device}: {_sentence(refusal)} Cast "
        f"it to a dtype that both libraries have{ways} or move it to a device that both see."
    ) from refusal


def _lend(source: Backend, array: Array, *, copy: bool) -> tuple[Array, bool]:
    """An array as others may take it, and whether they may write to it."""
    if isinstance(source, Exchange):
        return source.to_dlpack(array, copy=copy)
    return source.namespace.asarray(array, copy=True) if copy else array, True


def _borrow(target: Backend, lent: Array, *, copy: bool | None) -> Array:
    if isinstance(target, Exchange):
        return target.from_dlpack(lent, copy=copy)
    return target.namespace.from_dlpack(lent)


def _keeps_constants(target: Backend) -> bool:
    return isinstance(target, Exchange) and target.keeps_constants


def _is_elsewhere(lent: Array, target: Backend) -> bool:
    """Whether an array is on a kind of device where the target has no arrays at all."""
    if not isinstance(target, Exchange) or target.devices is None:
        return False
    kind: Any = lent.__dlpack_device__()[0]
    return int(kind) not in target.devices


def _sentence(refusal: Exception | None) -> str:
    """The first line of what a library says, with a full stop."""
    text = str(refusal).strip().partition("\n")[0] or type(refusal).__name__
    return text if text.endswith(".") else f"{text}."
