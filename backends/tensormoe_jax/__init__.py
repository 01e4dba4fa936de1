"""tensormoe on JAX: the layers as pure functions; as modules in :mod:`.nnx` and :mod:`.equinox`."""

from __future__ import annotations

from tensormoe._extras import missing

if absent := missing("tensormoe_jax", ("jax",), "jax"):
    raise absent

from tensormoe_jax._activations import ACTIVATIONS as ACTIVATIONS
from tensormoe_jax._adapter import BACKEND as BACKEND
from tensormoe_jax._adapter import JaxBackend as JaxBackend
from tensormoe_jax._initialize import initial_buffers as initial_buffers
from tensormoe_jax._initialize import initialize as initialize
from tensormoe_jax._pure import Given as Given
from tensormoe_jax._pure import apply as apply
from tensormoe_jax._pure import coefficients as coefficients
from tensormoe_jax._pure import route as route
from tensormoe_jax._pure import train as train

__all__ = [
    "ACTIVATIONS",
    "BACKEND",
    "Given",
    "JaxBackend",
    "apply",
    "coefficients",
    "initial_buffers",
    "initialize",
    "route",
    "train",
]
