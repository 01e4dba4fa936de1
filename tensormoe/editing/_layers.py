"""The layers of a configuration, their arrays, and arrays that are changed by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tensormoe._config import BlockConfig, LayerConfig
from tensormoe._spec import LayerSpec
from tensormoe._validation import brief, instance
from tensormoe.backend import Array, Backend, backend_of
from tensormoe.checkpoint import check_config
from tensormoe.errors import ShapeError, SpecError

Config = LayerConfig | BlockConfig
Arrays = Mapping[str, Array]


def checked(config: Config, arrays: Arrays) -> tuple[list[tuple[str, LayerSpec]], Backend]:
    """Specs of the layers by the prefix of their arrays' names, and the arrays' library."""
    check_config(config)
    instance(arrays, Mapping, "arrays", "a mapping from canonical names to arrays", SpecError)
    layers = {"": config} if isinstance(config, LayerConfig) else {}
    if isinstance(config, BlockConfig):
        layers = {"first.": config.first, "second.": config.second}
    specs = [(f"{prefix}factors.", layer.spec) for prefix, layer in layers.items()]
    shapes = {prefix + name: s for prefix, spec in specs for name, s in spec.shapes.items()}
    missing = next((name for name in shapes if name not in arrays), None)
    if missing is not None:
        raise ShapeError(
            f"arrays must hold {missing!r} of shape {shapes[missing]}; got {brief([*arrays])}. "
            "Pass all parameters of the layer by canonical name."
        )
    backend = backend_of(*(arrays[name] for name in shapes))
    for name, shape in shapes.items():
        if tuple(arrays[name].shape) != shape:
            raise ShapeError(f"{name} must have shape {shape}; got {tuple(arrays[name].shape)}.")
    return specs, backend


def edited(
    specs: list[tuple[str, LayerSpec]],
    arrays: Arrays,
    axes: Callable[[LayerSpec], Mapping[str, int]],
    change: Callable[[Array, int], Array],
) -> dict[str, Array]:
    """Arrays of which those with an axis of experts are changed."""
    found = dict(arrays)
    for prefix, spec in specs:
        for name, axis in axes(spec).items():
            found[prefix + name] = change(found[prefix + name], axis)
    return found
