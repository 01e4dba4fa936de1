"""Reading and writing of checkpoints: arrays by name, and what rebuilds their block."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any

from tensormoe._validation import brief, flag, instance
from tensormoe.backend import Array, Backend, backend_of, check_array
from tensormoe.checkpoint._files import checkpoint_path, open_regular, write_whole
from tensormoe.checkpoint._format import (
    CheckpointHeader,
    encode_header,
    file_order,
    parse_header,
)
from tensormoe.checkpoint._safetensors import ArrayInfo, read_frame
from tensormoe.errors import BackendError, CheckpointError


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint in memory.

    Args:
        block: class name of the block that was saved, e.g. ``"MuMoE"``.
        config: the values that rebuild the block, as JSON knows them.
        arrays: the arrays by name, all of one library.
        version: schema version of the file.
        bits: 8 or 4 where factors are rounded, and stored as codes and scales.
    """

    block: str
    config: Mapping[str, Any]
    arrays: Mapping[str, Array]
    version: int
    bits: int | None = None


@dataclass(frozen=True, eq=False)
class ArrayMatch:
    """Comparison of arrays with the shapes that a block expects.

    Args:
        arrays: those that fit, by name.
        missing: expected shapes of names that are not there.
        unexpected: found shapes of names that nobody expects.
        mismatched: (expected, found) shapes of names that are there in another shape.
    """

    arrays: Mapping[str, Array]
    missing: Mapping[str, tuple[int, ...]]
    unexpected: Mapping[str, tuple[int, ...]]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def exact(self) -> bool:
        """Whether names and shapes are just the expected ones."""
        return not (self.missing or self.unexpected or self.mismatched)

    def describe(self) -> str:
        """Every difference, one per line; empty where there is none."""
        lines = [
            *(f"{name!r} {shape} is missing" for name, shape in self.missing.items()),
            *(f"{name!r} {shape} is unexpected" for name, shape in self.unexpected.items()),
            *(
                f"{name!r} must have the shape {expected}; got {found}"
                for name, (expected, found) in self.mismatched.items()
            ),
        ]
        return "\n".join(lines)


def save_checkpoint(
    path: str | os.PathLike[str],
    block: str,
    config: Mapping[str, Any],
    arrays: Mapping[str, Array],
    bits: int | None = None,
) -> None:
    """Write a checkpoint that is there whole or not at all.

    Equal content gives equal bytes. A save that is killed leaves the old file as it was, and at
    most a hidden file whose name ends in :data:`PARTIAL_SUFFIX`, which the next save of that path
    removes. While it runs, the save takes as much memory again as the largest array, also of arrays
    that are cut over several devices.

    Args:
        path: the file to write or to replace, in a folder that exists.
        block: class name of the block, e.g. ``"MuMoE"``.
        config: plain values (``None``, ``bool``, ``int``, ``float``, ``str``, and ``dict`` and
            ``list`` of these) that rebuild the block; they come back equal.
        arrays: arrays of one library by name; of any shape, and of the dtypes bool, (u)int8 to
            (u)int64, float16, bfloat16, float32 and float64.
        bits: 8 or 4 where factors are given as codes and scales.

    Raises:
        TypeError: ``path`` is neither a string nor a path.
        BackendError: an array is of an unknown library, or of another one than the first.
        CheckpointError: something can't be stored, or the file can't be written; the message says
            what and why.
    """
    target = checkpoint_path(path)
    instance(arrays, Mapping, "arrays", "a mapping from names to arrays", CheckpointError)
    infos: dict[str, ArrayInfo] = {}
    backend: Backend | None = None
    for name, array in arrays.items():
        try:
            backend = backend_of(array) if backend is None else backend
        except BackendError as error:
            raise BackendError(f"array {name!r}: {error}") from None
        check_array(array, backend, f"array {name!r}")
        try:
            infos[name] = ArrayInfo(_dtype_name(array), tuple(array.shape))
        except CheckpointError as error:
            raise CheckpointError(f"array {name!r}: {error}") from None
    head = encode_header(CheckpointHeader(block, config, infos, bits=bits))
    contents = (_content(name, arrays[name], infos[name]) for name in file_order(infos))
    write_whole(target, chain([head], contents))


def _dtype_name(array: Array) -> str:
    """The canonical name of an array's dtype, without a look at its values."""
    name = getattr(array.dtype, "name", None)
    return name if isinstance(name, str) else str(array.dtype).rpartition(".")[2]


def _content(name: str, array: Array, info: ArrayInfo) -> bytes:
    """The bytes of one array, read when they are written: on the host, there is one at a time."""
    backend = backend_of(array)
    dtype, shape, content = backend.to_bytes(array)
    if (dtype, tuple(shape), len(content)) != (info.dtype, info.shape, info.nbytes):
        raise BackendError(
            f"the {backend.name} backend must give {info.nbytes} bytes for {info.dtype} "
            f"{info.shape}; got {len(content)} for {dtype} {tuple(shape)}, {name!r}."
        )
    return content


def read_checkpoint(path: str | os.PathLike[str], backend: Backend) -> Checkpoint:
    """Read a checkpoint, whichever library wrote it.

    The whole header is checked before anything else is read, so that no file, damaged or hostile,
    takes memory beyond a small multiple of its own size.

    Args:
        path: the file.
        backend: the library of the arrays to return.

    Raises:
        TypeError: ``path`` is neither a string nor a path.
        BackendError: ``backend`` is not a backend, or has no device to put arrays on.
        CheckpointError: there is no such file, it is not a whole checkpoint, a newer tensormoe
            wrote it, or the library doesn't have one of its dtypes.
    """
    if not isinstance(backend, Backend):
        raise BackendError(
            f"backend must be a tensormoe.backend.Backend; got {backend!r}. "
            "Pass for example tensormoe_numpy.BACKEND."
        )
    source = checkpoint_path(path)
    with open_regular(source) as (file, size):
        header = _read_header(source, file, size)
        # the header lists arrays in the order of the file, and they lie end to end
        arrays = {
            name: _read_array(source, file, name, info, backend)
            for name, info in header.arrays.items()
        }
    return Checkpoint(header.block, header.config, arrays, header.version, header.bits)


def peek_checkpoint(path: str | os.PathLike[str]) -> CheckpointHeader:
    """Look inside a checkpoint without loading its arrays; needs no array library.

    Args:
        path: the file.

    Raises:
        TypeError: ``path`` is neither a string nor a path.
        CheckpointError: there is no such file, it is not a whole checkpoint, or a newer tensormoe
            wrote it.
    """
    source = checkpoint_path(path)
    with open_regular(source) as (file, size):
        return _read_header(source, file, size)


def match_arrays(
    expected: Mapping[str, tuple[int, ...]],
    arrays: Mapping[str, Array],
    strict: bool = True,
) -> ArrayMatch:
    """Compare arrays with the shapes that a block expects.

    Args:
        expected: shape of every array by name.
        arrays: anything with a ``shape`` by name: the arrays of a :class:`Checkpoint`, or those
            of a :class:`CheckpointHeader` to compare before loading.
        strict: whether a difference is an error; otherwise the result lists them.

    Raises:
        CheckpointError: ``strict``, and something differs; the message lists every difference.

    >>> found = {"a": ArrayInfo("float32", (2,)), "b": ArrayInfo("float32", (3,))}
    >>> print(match_arrays({"a": (2,), "b": (4,), "c": ()}, found, strict=False).describe())
    'c' () is missing
    'b' must have the shape (4,); got (3,)
    """
    instance(expected, Mapping, "expected", "a mapping from names to shapes", CheckpointError)
    instance(arrays, Mapping, "arrays", "a mapping from names to arrays", CheckpointError)
    flag(strict, "strict", CheckpointError)
    for name, shape in expected.items():
        instance(shape, (tuple, list), f"the shape of {name!r}", "a tuple", CheckpointError)
    wanted = {name: tuple(shape) for name, shape in expected.items()}
    for name, array in arrays.items():
        if not isinstance(getattr(array, "shape", None), Iterable):
            raise CheckpointError(f"array {name!r} must have a shape; got {brief(array)}.")
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    match = ArrayMatch(
        arrays={name: arrays[name] for name in wanted if shapes.get(name) == wanted[name]},
        missing={name: shape for name, shape in wanted.items() if name not in shapes},
        unexpected={name: shape for name, shape in shapes.items() if name not in wanted},
        mismatched={
            name: (shape, shapes[name])
            for name, shape in wanted.items()
            if name in shapes and shapes[name] != shape
        },
    )
    if strict and not match.exact:
        raise CheckpointError(
            "arrays must have just the names and shapes of the block. Build the block from the "
            "checkpoint's own config, or pass strict=False to take what fits. Differences:\n"
            + match.describe()
        )
    return match


def _read_header(path: str, file: IO[bytes], size: int) -> CheckpointHeader:
    text = read_frame(path, file, size)
    try:
        return parse_header(text, size - 8 - len(text))
    except CheckpointError as error:
        raise CheckpointError(f"{path!r}: {error}") from error.__cause__


def _read_array(path: str, file: IO[bytes], name: str, info: ArrayInfo, backend: Backend) -> Array:
    data = file.read(info.nbytes)
    if len(data) != info.nbytes:
        raise CheckpointError(f"{path!r}: the file was cut short while it was read, at {name!r}.")
    try:
        return backend.from_bytes(info.dtype, info.shape, data)
    except BackendError:
        # says what the library lacks to run at all
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path!r}: the {backend.name} backend can't make an array {name!r} of {info.dtype} "
            f"{info.shape}: {error}. Load it with a library that has this dtype, and save it in "
            "another one."
        ) from error
