"""Layers with parameters in dictionaries by canonical name, and their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self, TypeAlias, TypeVar

import numpy as np

from tensormoe import functional
from tensormoe._layers import Costs, LayerMethods, Methods
from tensormoe._names import split_names
from tensormoe.backend import Array
from tensormoe.errors import ShapeError
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe.gates import Gate, TopK
from tensormoe.mixtures import MixtureConfig
from tensormoe_numpy._adapter import BACKEND
from tensormoe_numpy._like_numpy import NumpyLikeBackend
from tensormoe_numpy._random import FLOATS

__all__ = ["Given", "Gradients", "Held", "Layer", "check_cotangent"]

C = TypeVar("C", bound=LayerConfig | BlockConfig | MixtureConfig)

Given: TypeAlias = Array | TopK | Sequence[Array | TopK]


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients that a pullback returns.

    Args:
        input: by the layer's input; None for ids.
        parameters: by canonical name, as the layer's ``parameters``.
        coefficients: by ready-made coefficients, one array per level; empty if the layer's own gate
            made them.
    """

    input: Array | None
    parameters: dict[str, Array]
    coefficients: tuple[Array, ...] = ()


class Held(Methods[Array, C]):
    """Layers and blocks with parameters and buffers in dictionaries by canonical name."""

    _dtypes = FLOATS

    backend: ClassVar[NumpyLikeBackend] = BACKEND
    parameters: dict[str, Array]
    buffers: dict[str, Array]

    @property
    def arrays(self) -> dict[str, Array]:
        """Parameters and buffers by canonical name: all that :meth:`restore` needs."""
        return {**self.parameters, **self.buffers}

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the parameters; inputs must have it."""
        dtype: np.dtype[Any] = next(iter(self.parameters.values())).dtype
        return dtype

    def _weights(self) -> dict[str, Array]:
        return self.parameters

    def _saved_arrays(self) -> dict[str, Array]:
        return self.arrays

    def _costs(self) -> Costs:
        return {"itemsize": self.dtype.itemsize, "library": self.backend.library}

    def _dtype_text(self) -> str:
        return f"dtype={self.dtype.name!r}"


class Layer(Held[LayerConfig], LayerMethods[Array]):
    """Layers of one mixture."""

    @property
    def gate(self) -> Gate | None:
        """Rule from inputs to coefficients."""
        return self.config.gate

    @property
    def factors(self) -> dict[str, Array]:
        """The factors and the bias by their short names, as TensorLy's layouts take them."""
        return split_names(self.parameters)["factors"]

    @classmethod
    def _of_arrays(cls, config: LayerConfig, arrays: Mapping[str, Array]) -> Self:
        layer = cls.__new__(cls)
        layer._hold(config, arrays)
        return layer

    def _hold(
        self,
        config: LayerConfig,
        arrays: Mapping[str, Array],
        generator: np.random.Generator | None = None,
    ) -> None:
        self.config = config
        self._generator = np.random.default_rng(generator)
        self.parameters = {name: arrays[name] for name in config.parameter_shapes()}
        self.buffers = {name: arrays[name] for name in config.buffer_shapes()}

    def _rows(self, x: Array) -> tuple[tuple[int, ...], Array]:
        """The leading shape of a checked input, and its rows."""
        features = self.config.spec.in_features
        lead = functional.check_input(x, features, self.dtype, self.backend)
        return lead, x.reshape(prod(lead), features)

    def _merged(self, coefficients: Given, lead: tuple[int, ...]) -> list[Array | TopK]:
        """Ready-made coefficients with their leading axes merged into one."""
        return functional.merged_coefficients(self.config, coefficients, lead, self.backend)


def check_cotangent(
    cotangent: Array, shape: tuple[int, ...], dtype: np.dtype[Any], backend: NumpyLikeBackend
) -> None:
    """Refuse a cotangent that is not like the output."""
    functional.check_array(cotangent, backend, "the cotangent")
    if tuple(cotangent.shape) != shape:
        raise ShapeError(
            f"the cotangent must have the output's shape {shape}; got {tuple(cotangent.shape)}."
        )
    if cotangent.dtype != dtype:
        raise ShapeError(
            f"the cotangent must have the output's dtype {dtype}; got {cotangent.dtype}. Cast it."
        )
