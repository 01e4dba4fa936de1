"""A mixture in every framework: restored, run and differentiated in the same words.

Arrays come and go as NumPy's. Both of JAX's modules are compiled together, once per configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch

import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_torch
from tensormoe import convert
from tensormoe.mixtures import MixtureConfig

Arrays = Mapping[str, Any]

PACKAGES: Mapping[str, Any] = {"Flax NNX": tensormoe_jax.nnx, "Equinox": tensormoe_jax.equinox}
"""Where JAX's modules are."""


@dataclass(frozen=True, eq=False)
class Found:
    """What a mixture says.

    Attributes:
        output: outside training, from the record that ``route`` returned.
        trained: the output in training; outside it where training is random.
        gradients: of the latter, by ``input`` and the canonical names of parameters.
        buffers: after the call in training, by canonical name.
    """

    output: np.ndarray
    trained: np.ndarray
    gradients: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]


def of(package: Any, config: MixtureConfig) -> Any:
    """The class of a configuration's layers in a package."""
    return getattr(package, config.block)


def noisy(config: MixtureConfig) -> bool:
    """Whether calls in training are random."""
    return config.noise_shape(1) is not None


def drawn(config: MixtureConfig, dtype: str = "float64", seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters and buffers."""
    rng = np.random.default_rng(seed)
    shapes = {**config.parameter_shapes(), **config.buffer_shapes()}
    return {
        name: (0.7 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()
    }


def tokens(
    config: MixtureConfig, batch_shape: tuple[int, ...] = (2, 3), dtype: str = "float64"
) -> np.ndarray:
    """A random input."""
    rng = np.random.default_rng(1)
    return rng.standard_normal((*batch_shape, config.in_features)).astype(dtype)


# PyTorch


def torch_layer(config: MixtureConfig, arrays: Arrays) -> Any:
    """A mixture of copies of NumPy's arrays."""
    return of(tensormoe_torch, config).restore(config, convert(dict(arrays), "torch", copy=True))


def differentiated_by_torch(
    config: MixtureConfig, arrays: Arrays, x: np.ndarray, cotangent: np.ndarray
) -> Found:
    """Outputs and gradients of the module."""
    layer, given = torch_layer(config, arrays).eval(), torch.tensor(x)
    with torch.no_grad():
        output = layer(given, layer.route(given))
    layer.train(not noisy(config))
    sources = {**dict(layer.named_parameters()), "input": given.requires_grad_()}
    trained = layer(given)
    used = torch.autograd.grad(trained, list(sources.values()), torch.tensor(cotangent))
    gradients = {name: each.numpy() for name, each in zip(sources, used, strict=True)}
    buffers = convert(dict(layer.named_buffers()), "numpy")
    return Found(output.numpy(), trained.detach().numpy(), gradients, buffers)


# JAX


def state_of(make: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A module and its state, which is None but for Equinox's modules with buffers."""

    def made(*arguments: Any, **options: Any) -> tuple[Any, Any]:
        owner = getattr(make, "__self__", None)
        if isinstance(owner, type) and issubclass(owner, eqx.Module):
            module, state = eqx.nn.make_with_state(make)(*arguments, **options)
            return (module, state) if module.statistics is not None else (module, None)
        return make(*arguments, **options), None

    return made


def jax_module(name: str, config: MixtureConfig, arrays: Arrays) -> Any:
    """A module of Flax, or one of Equinox with its initial state inside, outside training."""
    held = {key: jnp.asarray(each) for key, each in arrays.items()}
    module = of(PACKAGES[name], config).restore(config, held)
    if name == "Equinox":
        return eqx.nn.inference_mode(module)
    module.eval()
    return module


def _run_nnx(module: Any, x: Any) -> Any:
    return module(x, module.route(x))


def _run_equinox(module: Any, x: Any) -> Any:
    if module.statistics is None:
        return module(x, module.route(x))
    state = eqx.nn.State(module)
    routes, state = module.route(x, state)
    output, _ = module(x, routes, state)
    return output


FORMS: Mapping[str, Callable[[Any, Any], Any]] = {"Flax NNX": _run_nnx, "Equinox": _run_equinox}
"""Output of a module outside training, by way of its routing record."""


def _trained_nnx(config: MixtureConfig, arrays: Arrays, x: Any) -> tuple[Any, Any]:
    module = of(PACKAGES["Flax NNX"], config).restore(config, arrays)
    if noisy(config):
        module.eval()
    return module(x), module.buffers


def _trained_equinox(config: MixtureConfig, arrays: Arrays, x: Any) -> tuple[Any, Any]:
    module, state = state_of(of(PACKAGES["Equinox"], config).restore)(config, arrays)
    quiet = {"inference": True} if noisy(config) else {}
    if state is None:
        return module(x, **quiet), {}
    output, state = module(x, state=state, **quiet)
    return output, module.buffers(state)


_TRAINED: Mapping[str, Callable[..., tuple[Any, Any]]] = {
    "Flax NNX": _trained_nnx,
    "Equinox": _trained_equinox,
}


@cache
def _differentiated(config: MixtureConfig) -> Any:
    @jax.jit
    def run(arrays: Any, x: Any, cotangent: Any) -> Any:
        found = {}
        for name, form in _TRAINED.items():

            def training(sources: Any, form: Any = form) -> Any:
                parameters = {key: sources[key] for key in config.parameter_shapes()}
                return form(config, {**arrays, **parameters}, sources["input"])

            sources = {key: arrays[key] for key in config.parameter_shapes()} | {"input": x}
            trained, pull, buffers = jax.vjp(training, sources, has_aux=True)
            output = FORMS[name](jax_module(name, config, arrays), x)
            found[name] = output, trained, pull(cotangent)[0], buffers
        return found

    return run


def differentiated_by_jax(
    config: MixtureConfig, arrays: Arrays, x: np.ndarray, cotangent: np.ndarray
) -> dict[str, Found]:
    """Outputs and gradients of both modules, by name, in float64."""
    with jax.enable_x64(True):
        given = {name: jnp.asarray(each) for name, each in arrays.items()}
        found = _differentiated(config)(given, jnp.asarray(x), jnp.asarray(cotangent))
        return {name: Found(*jax.tree.map(np.asarray, each)) for name, each in found.items()}


def by_jax(config: MixtureConfig, arrays: Arrays, x: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs of both modules, by name, in the dtype of the arrays."""

    @jax.jit
    def run(arrays: Any, x: Any) -> Any:
        return {name: form(jax_module(name, config, arrays), x) for name, form in FORMS.items()}

    found = run({name: jnp.asarray(each) for name, each in arrays.items()}, jnp.asarray(x))
    return {name: np.asarray(each) for name, each in found.items()}
