"""A block's configuration and arrays, from a checkpoint or given, checked against one another."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from os import PathLike
from typing import TypeVar

from tensormoe._config import BlockConfig, LayerConfig
from tensormoe._mixture import MixtureConfig
from tensormoe._names import makes_logits
from tensormoe._rounding import CODES, SCALES, code_names, rounded_values
from tensormoe._validation import brief, instance
from tensormoe.backend import Array, Backend, check_array
from tensormoe.checkpoint._checkpoint import match_arrays, read_checkpoint
from tensormoe.errors import CheckpointError, ShapeError, SpecError, TensormoeError

C = TypeVar("C", bound=LayerConfig | BlockConfig | MixtureConfig)


def read_block(
    path: str | PathLike[str], block: str, kind: type[C], backend: Backend
) -> tuple[C, Mapping[str, Array]]:
    """Configuration and arrays of a checkpoint, checked against one another.

    Args:
        path: the file.
        block: class name of the block that it must hold.
        kind: class of the block's configuration.
        backend: the library of the arrays to return.

    Raises:
        CheckpointError: not a checkpoint, another kind of block, or arrays that do not fit; the
            message lists every difference.
    """
    saved = read_checkpoint(path, backend)
    if saved.block != block:
        raise CheckpointError(
            f"the file must hold a {block}; got a {saved.block}. Open it with {saved.block}.load."
        )
    try:
        config: C = kind.from_dict(saved.config)  # type: ignore[assignment]
    except TensormoeError as error:
        raise CheckpointError(f"the file does not describe a {block}: {error}") from error
    shapes = {**config.parameter_shapes(), **config.buffer_shapes()}
    if saved.bits is None:
        match_arrays(shapes, saved.arrays)
        return config, saved.arrays
    return config, _dequantized(shapes, saved.arrays, saved.bits, backend)


def _dequantized(
    shapes: Mapping[str, tuple[int, ...]], arrays: Mapping[str, Array], bits: int, backend: Backend
) -> dict[str, Array]:
    """Arrays of which some are stored as codes and scales, all in floating point.

    Raises:
        CheckpointError: names, shapes or dtypes that are not those of the block.
    """
    rounded = {name: shape for name, shape in shapes.items() if f"{name}.{CODES}" in arrays}
    plain = {name: shape for name, shape in shapes.items() if name not in rounded}
    match_arrays(plain | code_names(rounded, bits), arrays)
    found = {name: arrays[name] for name in plain}
    xp = backend.namespace
    wanted = xp.int8 if bits == 8 else xp.uint8
    for name in rounded:
        codes, scales = arrays[f"{name}.{CODES}"], arrays[f"{name}.{SCALES}"]
        if codes.dtype != wanted or not xp.isdtype(scales.dtype, "real floating"):
            raise CheckpointError(
                f"codes of {bits} bits must be {wanted}, and their scales floating-point; got "
                f"{codes.dtype} and {scales.dtype} for {name!r}. The file is damaged: restore it "
                "from a copy."
            )
        found[name] = rounded_values(codes, scales, shapes[name], bits, backend)
    return found


def check_config(config: LayerConfig | BlockConfig | MixtureConfig, *blocks: str) -> None:
    """Refuse what is not the configuration of a layer of the given classes; of any by default.

    Raises:
        SpecError: not a configuration, or that of another class of layers.
    """
    known = isinstance(config, LayerConfig | BlockConfig | MixtureConfig)
    if not known or (blocks and config.block not in blocks):
        found = f"that of a {config.block}" if known else brief(config)
        raise SpecError(
            f"config must be that of a {' or a '.join(blocks) or 'layer or block'}; got {found}. "
            "Pass the config of another layer."
        )


def check_arrays(
    config: LayerConfig | BlockConfig | MixtureConfig,
    arrays: Mapping[str, Array],
    backend: Backend,
    dtypes: Collection[object],
) -> None:
    """Refuse arrays that do not make a layer or a block; plan for those that do.

    Args:
        config: the layer or block.
        arrays: parameters and buffers by canonical name.
        backend: the library that the arrays must be of.
        dtypes: those that a layer may be stored in; by name, or as the library's values.

    Raises:
        SpecError: not a configuration, or not a mapping.
        BackendError: arrays of another library.
        CheckpointError: names or shapes that are not the layer's; lists every difference.
        ShapeError: parameters of different dtypes, or of one that no layer has; a gate may be in
            float32 beside factors of 16 bits.
    """
    check_config(config)
    instance(arrays, Mapping, "arrays", "a mapping from names to arrays", SpecError)
    for name, array in arrays.items():
        check_array(array, backend, name)
    shapes = config.parameter_shapes()
    match_arrays({**shapes, **config.buffer_shapes()}, arrays)
    dtype = arrays[next(iter(shapes))].dtype
    gates = [name for name in shapes if makes_logits(name)]
    # logits are float32 at least: a gate in float32 is what they are made of
    apart = bool(gates) and _widens(dtype, arrays[gates[0]].dtype, backend)
    for name in shapes:
        found = arrays[name].dtype
        wanted = arrays[gates[0]].dtype if apart and name in gates else dtype
        if found != wanted or getattr(found, "name", found) not in dtypes:
            raise ShapeError(
                f"parameters must have one dtype of {', '.join(map(str, dtypes))}; got {found} "
                f"for {name!r} and {dtype} for the first. Cast them: only a gate may be in float32 "
                "beside factors of 16 bits."
            )
    config.plan_ahead()


def _widens(dtype: object, other: object, backend: Backend) -> bool:
    """Whether a layer of one dtype, of 16 bits, may have a gate of the other, float32."""
    xp = backend.namespace
    floats = xp.isdtype(dtype, "real floating")
    return bool(floats and xp.finfo(dtype).bits < 32 and other == xp.float32)
