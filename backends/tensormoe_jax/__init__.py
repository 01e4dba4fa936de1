"""tensormoe on JAX: the layers as pure functions; as modules in :mod:`.nnx` and :mod:`.equinox`."""

from __future__ import annotations

from tensormoe._extras import missing

if absent := missing("tensormoe_jax", ("jax",), "jax"):
    raise absent

from tensormoe_jax._activations import ACTIVATIONS
from tensormoe_jax._adapter import BACKEND, LIBRARY, JaxBackend
from tensormoe_jax._initialize import initial_buffers, initialize
from tensormoe_jax._memory import compiled_memory
from tensormoe_jax._pure import Given, apply, coefficients, route, train
from tensormoe_jax._specs import Legs, partition_specs

__all__ = [
    "ACTIVATIONS",
    "BACKEND",
    "LIBRARY",
    "Given",
    "JaxBackend",
    "Legs",
    "apply",
    "coefficients",
    "compiled_memory",
    "initial_buffers",
    "initialize",
    "partition_specs",
    "route",
    "train",
]
