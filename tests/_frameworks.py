"""A layer of any library, built, opened, run, differentiated and saved in the same words.

Arrays come and go as NumPy's. NumPy's and CuPy's layers are here; nothing needs another library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import tensormoe_numpy
from tensormoe import TopK
from tensormoe.functional import BlockConfig, LayerConfig
from tests._cupy_standin import ADAPTER, device, host, installed

Config = LayerConfig | BlockConfig
Arrays = Mapping[str, np.ndarray]
Made = Sequence[Any]


@dataclass(frozen=True, eq=False)
class Call:
    """What a layer is given.

    Args:
        x: (..., in), or ids (...).
        made: ready-made coefficients, an array or a ``TopK`` a level; None for the layer's gate.
        cotangent: of the output.
    """

    x: np.ndarray
    made: Made | None
    cotangent: np.ndarray


@dataclass(frozen=True, eq=False)
class Found:
    """What a layer says.

    Args:
        output: outside training.
        trained: the output in training, where batch norm uses the batch's own statistics.
        gradients: in training, by ``input`` (not for ids), ``coefficients_<level>`` (if they were
            given), and by the canonical names of parameters.
        buffers: after the call in training, by canonical name.
    """

    output: np.ndarray
    trained: np.ndarray
    gradients: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]


@dataclass(frozen=True)
class Framework:
    """How a framework does what all of them do.

    Args:
        name: for messages and tables.
        restore: a layer of a configuration and NumPy's arrays, which are copied.
        load: a layer of a file, by class name and path.
        save: writes a layer to a path.
        arrays: parameters and buffers of a layer by canonical name, in NumPy.
        run: calls a layer, both outside and in training, and differentiates the latter.
        precision: a context in which arrays may have the dtype.
    """

    name: str
    restore: Callable[[Config, Arrays], Any]
    load: Callable[[str, Path], Any]
    save: Callable[[Any, Path], None]
    arrays: Callable[[Any], dict[str, np.ndarray]]
    run: Callable[[Any, Call], Found]
    precision: Callable[[str], Any] = field(default=lambda dtype: nullcontext())

    def __str__(self) -> str:
        return self.name


def class_name(config: Config) -> str:
    """Name of the class of a configuration's layers, the same in every framework."""
    if isinstance(config, BlockConfig):
        return "MuMoEMLP"
    return "MuMoEEmbedding" if config.indexed_input else "MuMoE"


def mapped(function: Callable[[Any], Any], made: Made | None) -> list[Any] | None:
    """Ready-made coefficients with a function applied to each array."""
    if made is None:
        return None
    return [
        TopK(function(each.indices), function(each.values))
        if isinstance(each, TopK)
        else function(each)
        for each in made
    ]


def values_of(made: Made | None) -> list[Any]:
    """What ready-made coefficients are differentiated by."""
    return [each.values if isinstance(each, TopK) else each for each in made or ()]


def levels(arrays: Sequence[Any]) -> dict[str, Any]:
    return {f"coefficients_{level}": array for level, array in enumerate(arrays)}


# NumPy, and CuPy with the same layers


def _restore_numpy(config: Config, arrays: Arrays) -> Any:
    copies = {name: array.copy() for name, array in arrays.items()}
    return getattr(tensormoe_numpy, class_name(config)).restore(config, copies)


def _restore_cupy(config: Config, arrays: Arrays) -> Any:
    import tensormoe_cupy

    return getattr(tensormoe_cupy, class_name(config)).restore(config, device(dict(arrays)))


def _run_numpy(put: Callable[[Any], Any], get: Callable[[Any], Any], layer: Any, call: Call) -> Any:
    x, made = put(call.x), mapped(put, call.made)
    output = layer(x) if made is None else layer(x, made)
    trained, pull = layer.vjp(x) if made is None else layer.vjp(x, made)
    found = pull(put(call.cotangent))
    named = {**found.parameters, **levels(found.coefficients)}
    if found.input is not None:
        named["input"] = found.input
    return Found(get(output), get(trained), get(named), get(dict(layer.buffers)))


def save(layer: Any, path: Path) -> None:
    layer.save(path)


def _load_cupy(kind: str, path: Path) -> Any:
    import tensormoe_cupy

    return getattr(tensormoe_cupy, kind).load(path)


NUMPY = Framework(
    "NumPy",
    restore=_restore_numpy,
    load=lambda kind, path: getattr(tensormoe_numpy, kind).load(path),
    save=save,
    arrays=lambda layer: dict(layer.arrays),
    run=partial(_run_numpy, lambda array: array, lambda array: array),
)
CUPY = Framework(
    "CuPy",
    restore=_restore_cupy,
    load=_load_cupy,
    save=save,
    arrays=lambda layer: host(layer.arrays),
    run=partial(_run_numpy, device, host),
)


@contextmanager
def everywhere() -> Iterator[None]:
    """CuPy's layers run, on the stand-in or on the device."""
    assert ADAPTER.name == "cupy"
    with installed():
        yield
