"""Parts that the layers of Flax and Equinox share: making, naming and describing their arrays."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
from jax import Array

from tensormoe._layers import (
    BlockMethods,
    Costs,
    LayerMethods,
    Methods,
    check_constructor,
)
from tensormoe.backend import Backend
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe.mixtures import MixtureConfig
from tensormoe_jax._adapter import BACKEND, LIBRARY
from tensormoe_jax._dtypes import FLOATS
from tensormoe_jax._initialize import initial_buffers, initialize
from tensormoe_jax._specs import MeshCut

C = TypeVar("C", bound=LayerConfig | BlockConfig | MixtureConfig)
M = TypeVar("M")


def first_values(
    config: LayerConfig | BlockConfig | MixtureConfig,
    key: Array,
    init: str,
    dtype: Any,
    gate_dtype: Any = None,
) -> dict[str, Array]:
    """Initial parameters and buffers by canonical name.

    Args:
        config: the layer or block.
        key: of ``jax.random``.
        init: ``"variance"`` or ``"paper"``.
        dtype: of the parameters.
        gate_dtype: of the gate's, if it is another one.
    """
    drawn = initialize(config, key, init=init, dtype=dtype, gate_dtype=gate_dtype)
    return drawn | initial_buffers(config, dtype=dtype)


def built(kind: type[M], base: type[Any], *arguments: Any) -> M:
    """An object of a class whose constructor draws arrays, by the constructor of its base.

    Args:
        kind: the class.
        base: what it inherits from; its constructor takes a configuration and arrays.
        arguments: of that constructor.

    Raises:
        TypeError: a user's class with a constructor of its own.
    """
    check_constructor(kind, "restore, which load calls")
    made = base(*arguments)
    # both frameworks prepare an object around the call of a constructor, and offer no other door
    object.__setattr__(made, "__class__", kind)
    return made  # type: ignore[no-any-return]


class _Named(Methods[Array, C]):
    """Parameters by canonical name."""

    _dtypes = FLOATS

    backend: ClassVar[Backend] = BACKEND

    cut: MeshCut | None

    @property
    def legs(self) -> dict[str, str] | None:
        """The leg that is cut and its mesh axis, as ``parallelize`` was given them, or None."""
        return None if self.cut is None else {self.cut.leg: self.cut.axis}

    @property
    @abstractmethod
    def parameters(self) -> dict[str, Array]:
        """The trainable arrays by canonical name, as the functional form takes them."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the factors; inputs must have it. A gate may be in float32 beside them."""
        dtype: np.dtype[Any] = next(iter(self.parameters.values())).dtype
        return dtype

    def _weights(self) -> dict[str, Array]:
        return self.parameters

    def _costs(self) -> Costs:
        return {"itemsize": self.dtype.itemsize, "library": LIBRARY}

    def _dtype_text(self) -> str:
        # what transformations leave in the place of an array may have no dtype
        first, *_, last = self.parameters.values()
        if not hasattr(first, "dtype") or not hasattr(last, "dtype"):
            return "dtype=?"
        gate = f", gate_dtype={last.dtype.name!r}" if last.dtype != first.dtype else ""
        return f"dtype={first.dtype.name!r}{gate}"


class Layer(_Named[LayerConfig], LayerMethods[Array]):
    """Layers of one mixture; parameters are ``factors.<name>`` and ``gate.<name>``."""


class Block(_Named[BlockConfig], BlockMethods[Array]):
    """Blocks: ``first.factors.<name>``, ``second.factors.<name>``, ``gate.<name>``."""

    first: Any
    second: Any
    act: Callable[[Array], Array] | None

    @property
    def num_parameters(self) -> int:
        """Trainable entries, the gate's included."""
        own = (each for each in jax.tree.leaves(self.act) if isinstance(each, Array))
        return super().num_parameters + sum(each.size for each in own)

    def _layers(self) -> tuple[Layer, Layer]:
        return self.first, self.second
