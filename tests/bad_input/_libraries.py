"""Small layers of every library, and what a refusal is in its words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import tensormoe_cupy
import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_numpy
import tensormoe_torch
from tensormoe import TopK
from tensormoe.errors import TensormoeError
from tests._cupy_standin import device
from tests.bad_input._cases import assert_refused


@dataclass(frozen=True)
class Library:
    """Small layers of one library, and its arrays.

    Args:
        name: as messages have it.
        package: where its layers are.
        array: from NumPy.
        foreign: an array of another library, and its type's name.
        dtype: how messages begin the name of a dtype.
        random: what layers start from.
        values_are_seen: whether values are on the host, where indices are checked.
    """

    name: str
    package: Any
    array: Callable[[np.ndarray], Any]
    foreign: tuple[Any, str] = (np.ones((3, 8), "float32"), r"numpy\.ndarray")
    dtype: str = ""
    random: Callable[[], dict[str, Any]] = dict
    values_are_seen: bool = True

    def __str__(self) -> str:
        return self.package.__name__.removeprefix("tensormoe_")

    def layer(self, experts: Any = 3, **options: Any) -> Any:
        given = {"factorization": "cp", "rank": 2} | self.random() | options
        return self.package.MuMoE(8, 4, experts, **given)

    def tree(self) -> Any:
        return self.layer((3, 2))

    def block(self, **options: Any) -> Any:
        given = {"experts": 3, "rank": 2} | self.random() | options
        return self.package.MuMoEMLP(8, **given)

    def table(self) -> Any:
        return self.package.MuMoEEmbedding(9, 4, 3, rank=2, **self.random())

    def ones(self, *shape: int, dtype: str = "float32") -> Any:
        return self.array(np.ones(shape, dtype))

    def x(self) -> Any:
        return self.ones(3, 8)

    def ids(self, *values: int) -> Any:
        return self.array(np.array(values, "int32"))

    def chosen(self, index: int = 0, k: int = 1) -> Any:
        """The same ``k`` experts for three inputs."""
        return TopK(self.array(np.full((3, k), index, "int32")), self.ones(3, k))


_HOST = (torch.ones(3, 8), r"torch\.Tensor")
LIBRARIES = [
    Library("numpy", tensormoe_numpy, np.asarray, _HOST),
    Library("cupy", tensormoe_cupy, device, values_are_seen=False),
    Library("torch", tensormoe_torch, torch.tensor, dtype=r"torch\."),
    Library("jax", tensormoe_jax.nnx, jnp.asarray, random=lambda: {"rngs": 0}),
    Library("jax", tensormoe_jax.equinox, jnp.asarray, random=lambda: {"key": jax.random.key(0)}),
]


def assert_refused_by(
    library: Library, call: Callable[[], Any], error: type[TensormoeError], message: str
) -> None:
    """An error whose message has the library's own words in place of ``{name}`` and others."""
    words = {"name": library.name, "dtype": library.dtype, "foreign": library.foreign[1]}
    for key, value in words.items():
        message = message.replace(f"{{{key}}}", value)
    assert_refused(call, error, message)
