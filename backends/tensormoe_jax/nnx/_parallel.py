"""Layers of a model, cut over a mesh axis."""

from __future__ import annotations

from typing import Any, TypeVar

from flax import nnx

from tensormoe._names import block_names
from tensormoe._validation import instance
from tensormoe.errors import SpecError
from tensormoe_jax._mesh import checked_mesh, on_mesh
from tensormoe_jax._specs import Legs, cut_of, has_leg, leg_of, no_layer, partition_specs
from tensormoe_jax.nnx._base import Mixture
from tensormoe_jax.nnx._mlp import Pair

__all__ = ["parallelize"]

M = TypeVar("M", bound=nnx.Module)


def parallelize(model: M, legs: Legs) -> M:
    """Cut the layers of a model along one leg over an axis of the mesh that is set, in place.

    It applies to every block for ``{"hidden": "model"}``, and otherwise to every layer that has the
    leg, blocks left out. Their arrays are placed on the mesh, ``out_sharding`` of the variables
    says how (``flax.nnx.get_partition_spec``), and a call runs each device's part with one sum over
    the axis. Inside of ``nnx.jit``, placing is a constraint for the compiler.

    A layer stays what it is: its ``config``, its checkpoints and its ``repr`` are the whole one's.
    Calls, and what makes variables anew, such as an ``nnx.Optimizer``, need the mesh.

    Args:
        model: a layer, or any module with layers of tensormoe inside.
        legs: one leg and the mesh axis: ``{"r": "model"}``, with a leg of ``spec.network``, or
            ``{"hidden": "model"}``.

    Returns:
        The model.

    Raises:
        SpecError: no module, no mesh, no such axis; no layer with the leg, or one whose leg is not
            a multiple of the axis.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from tensormoe_jax.nnx import MuMoEMLP
    >>> mesh = jax.make_mesh((1,), ("model",))
    >>> with jax.set_mesh(mesh):
    ...     block = parallelize(MuMoEMLP(8, 16, experts=4, rank=2, rngs=0), {"hidden": "model"})
    ...     y = nnx.jit(lambda block, x: block(x))(block, jnp.ones((5, 8)))
    >>> block.legs, tuple(block.second.factors["input"].get_metadata("out_sharding"))
    ({'hidden': 'model'}, ('model',))
    """
    instance(model, nnx.Module, "model", "an nnx.Module", SpecError)
    cut = leg_of(legs)
    devices = checked_mesh(cut).shape[cut.axis]
    layers = [module for module in _outer(model) if has_leg(module.config, cut)]
    if not layers:
        raise no_layer(cut, [module.config for module in _outer(model)])
    for module in layers:
        # before anything is changed
        cut_of(module.config, cut, devices)
    for module in layers:
        specs = partition_specs(module.config, legs)
        module.cut = cut
        for name, variable in _variables(module).items():
            variable.set_value(on_mesh(variable.get_value(), specs[name]))
            if any(specs[name]):
                variable.set_metadata(out_sharding=specs[name])
    return model


def _outer(model: nnx.Module) -> list[Mixture | Pair]:
    """Layers and blocks; layers of a block are the block's."""
    found = [
        (path, module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Mixture | Pair)
    ]
    blocks = [path for path, module in found if isinstance(module, Pair)]
    return [
        module
        for path, module in found
        if not any(path != block and path[: len(block)] == block for block in blocks)
    ]


def _variables(module: Mixture | Pair) -> dict[str, nnx.Variable[Any]]:
    """Parameters and buffers by canonical name."""
    if isinstance(module, Pair):
        named = block_names(_variables(module.first), _variables(module.second))
    else:
        named = {f"factors.{name}": each for name, each in module.factors.items()}
    return named if module.gate is None else named | module.gate.variables
