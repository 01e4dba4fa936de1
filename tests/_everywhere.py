"""One layer in every framework: built, opened, run, differentiated and saved in the same words.

Arrays come and go as NumPy's. JAX compiles each operation for each shape, so that its three forms
run under one ``jit`` for each configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch

import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_numpy
import tensormoe_torch
from tensormoe import TopK, convert
from tensormoe.checkpoint import read_block, save_checkpoint
from tensormoe.functional import BlockConfig, LayerConfig
from tests._cupy_standin import ADAPTER, device, host

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


# PyTorch


def _restore_torch(config: Config, arrays: Arrays) -> Any:
    kind = getattr(tensormoe_torch, class_name(config))
    return kind.restore(config, convert(dict(arrays), "torch", copy=True))


def _run_torch(layer: Any, call: Call) -> Found:
    def tensor(array: np.ndarray) -> torch.Tensor:
        return convert(array, "torch", copy=True)

    x, made = tensor(call.x), mapped(tensor, call.made)
    layer.eval()
    with torch.no_grad():
        output = layer(x, made)
    layer.train()
    sources = dict(layer.named_parameters()) | levels(values_of(made))
    if x.is_floating_point():
        sources["input"] = x
    for each in sources.values():
        each.requires_grad_()
    trained = layer(x, made)
    # what nothing depends on, as a gate where coefficients are given
    used = torch.autograd.grad(
        trained, list(sources.values()), tensor(call.cotangent), allow_unused=True
    )
    gradients = {
        name: convert(each, "numpy")
        for name, each in zip(sources, used, strict=True)
        if each is not None
    }
    buffers = convert(dict(layer.named_buffers()), "numpy")
    return Found(convert(output, "numpy"), convert(trained.detach(), "numpy"), gradients, buffers)


# JAX: functions, and modules of two kinds


def jax_pure(config: Config, arrays: Any, x: Any, made: Any) -> tuple[Any, Any, Any]:
    named = config.parameter_shapes()
    parameters = {name: array for name, array in arrays.items() if name in named}
    buffers = {name: array for name, array in arrays.items() if name not in named}
    output = tensormoe_jax.apply(config, parameters, x, made, buffers=buffers)
    return output, *tensormoe_jax.train(config, parameters, x, made, buffers=buffers)


def jax_nnx(config: Config, arrays: Any, x: Any, made: Any) -> tuple[Any, Any, Any]:
    layer = getattr(tensormoe_jax.nnx, class_name(config)).restore(config, arrays)
    layer.eval()
    output = layer(x, made)
    layer.train()
    return output, layer(x, made), layer.buffers


def jax_equinox(config: Config, arrays: Any, x: Any, made: Any) -> tuple[Any, Any, Any]:
    kind = getattr(tensormoe_jax.equinox, class_name(config))
    layer, state = eqx.nn.make_with_state(kind.restore)(config, arrays)
    quiet = eqx.nn.inference_mode(layer)
    if not layer.is_stateful():
        return quiet(x, made), layer(x, made), {}
    output, _ = quiet(x, made, state=state)
    trained, state = layer(x, made, state=state)
    return output, trained, layer.buffers(state)


Form = Callable[[Config, Any, Any, Any], tuple[Any, Any, Any]]


@cache
def _differentiated(form: Form, config: Config) -> Callable[..., Any]:
    """A form of the layer with its gradients, compiled once for each configuration."""

    @jax.jit
    def run(arrays: Any, x: Any, made: Any, cotangent: Any) -> Any:
        names = config.parameter_shapes()

        def training(sources: Any) -> Any:
            given = None if made is None else list(made)
            for level, each in enumerate(given or ()):
                values = sources[f"coefficients_{level}"]
                given[level] = TopK(each.indices, values) if isinstance(each, TopK) else values
            parameters = {name: sources[name] for name in names}
            output, trained, buffers = form(
                config, {**arrays, **parameters}, sources.get("input", x), given
            )
            return trained, (output, buffers)

        sources = {name: arrays[name] for name in names} | levels(values_of(made))
        if jnp.issubdtype(x.dtype, jnp.floating):
            sources["input"] = x
        trained, pull, (output, buffers) = jax.vjp(training, sources, has_aux=True)
        return output, trained, pull(cotangent)[0], buffers

    return run


@dataclass(frozen=True, eq=False)
class JaxLayer:
    """A layer of one of JAX's forms: its configuration, and what it holds."""

    config: Config
    arrays: dict[str, Any]


def _run_jax(form: Form, layer: JaxLayer, call: Call) -> Found:
    made = mapped(jnp.asarray, call.made)
    output, trained, gradients, buffers = jax.tree.map(
        np.asarray,
        _differentiated(form, layer.config)(
            layer.arrays, jnp.asarray(call.x), made, jnp.asarray(call.cotangent)
        ),
    )
    if made is not None:
        # JAX has zeros where nothing depends on a parameter
        gate = {name for name in gradients if name.startswith("gate.")}
        assert not any(np.any(gradients[name]) for name in gate)
        gradients = {name: each for name, each in gradients.items() if name not in gate}
    return Found(output, trained, gradients, buffers)


def _load_pure(kind: str, path: Path) -> JaxLayer:
    block = BlockConfig if kind == "MuMoEMLP" else LayerConfig
    return JaxLayer(*read_block(path, kind, block, tensormoe_jax.BACKEND))


def _save_pure(layer: JaxLayer, path: Path) -> None:
    save_checkpoint(path, class_name(layer.config), layer.config.to_dict(), layer.arrays)


def _load_module(package: Any, kind: str, path: Path) -> JaxLayer:
    layer = getattr(package, kind).load(path)
    buffers = layer.buffers() if callable(layer.buffers) else layer.buffers
    return JaxLayer(layer.config, {**layer.parameters, **buffers})


def _save_module(package: Any, layer: JaxLayer, path: Path) -> None:
    getattr(package, class_name(layer.config)).restore(layer.config, layer.arrays).save(path)


def _jax(name: str, form: Form, load: Any, save: Any) -> Framework:
    return Framework(
        name,
        restore=lambda config, arrays: JaxLayer(config, jax.tree.map(jnp.asarray, dict(arrays))),
        load=load,
        save=save,
        arrays=lambda layer: jax.tree.map(np.asarray, dict(layer.arrays)),
        run=partial(_run_jax, form),
        precision=lambda dtype: jax.enable_x64(dtype == "float64"),
    )


def _save(layer: Any, path: Path) -> None:
    layer.save(path)


def _load_cupy(kind: str, path: Path) -> Any:
    import tensormoe_cupy

    return getattr(tensormoe_cupy, kind).load(path)


NUMPY = Framework(
    "NumPy",
    restore=_restore_numpy,
    load=lambda kind, path: getattr(tensormoe_numpy, kind).load(path),
    save=_save,
    arrays=lambda layer: dict(layer.arrays),
    run=partial(_run_numpy, lambda array: array, lambda array: array),
)
CUPY = Framework(
    "CuPy",
    restore=_restore_cupy,
    load=_load_cupy,
    save=_save,
    arrays=lambda layer: host(layer.arrays),
    run=partial(_run_numpy, device, host),
)
TORCH = Framework(
    "PyTorch",
    restore=_restore_torch,
    load=lambda kind, path: getattr(tensormoe_torch, kind).load(path),
    save=_save,
    arrays=lambda layer: convert(layer.state_dict(), "numpy"),
    run=_run_torch,
)
JAX = _jax("JAX", jax_pure, _load_pure, _save_pure)
NNX = _jax(
    "Flax NNX",
    jax_nnx,
    partial(_load_module, tensormoe_jax.nnx),
    partial(_save_module, tensormoe_jax.nnx),
)
EQUINOX = _jax(
    "Equinox",
    jax_equinox,
    partial(_load_module, tensormoe_jax.equinox),
    partial(_save_module, tensormoe_jax.equinox),
)

FORMS = {"JAX": jax_pure, "Flax NNX": jax_nnx, "Equinox": jax_equinox}
"""What JAX's forms run: of a configuration, arrays, input and coefficients to the output, that in
training, and buffers."""

PACKAGES = {"Flax NNX": tensormoe_jax.nnx, "Equinox": tensormoe_jax.equinox}
"""Where JAX's modules are."""

EAGER = (NUMPY, CUPY, TORCH)
"""Those that compile nothing, for many examples."""

COMPILED = (JAX, NNX, EQUINOX)
"""JAX's, for few shapes."""

FRAMEWORKS = (*EAGER, *COMPILED)


@contextmanager
def everywhere() -> Iterator[None]:
    """CuPy's layers run, on the stand-in or on the device."""
    from tests._cupy_standin import installed

    assert ADAPTER.name == "cupy"
    with installed():
        yield
