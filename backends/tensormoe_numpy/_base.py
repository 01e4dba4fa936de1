"""What the layers share: parameters by canonical name, checkpoints, and ready-made coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np

from tensormoe import LayerSpec, functional
from tensormoe._html import layer_html
from tensormoe.backend import Array
from tensormoe.checkpoint import check_arrays, check_config, read_block, save_checkpoint
from tensormoe.errors import ShapeError
from tensormoe.functional import LayerConfig
from tensormoe.gates import Gate, TopK
from tensormoe.planning import Cost, Plan
from tensormoe_numpy._adapter import BACKEND
from tensormoe_numpy._like_numpy import NumpyLikeBackend
from tensormoe_numpy._random import FLOATS

__all__ = ["Given", "Gradients", "Layer", "check_cotangent"]

Given: TypeAlias = Array | TopK | Sequence[Array | TopK]


@dataclass(frozen=True, eq=False)
class Gradients:
    """What a pullback returns.

    Args:
        input: by the layer's input; None for ids.
        parameters: by canonical name, as the layer's ``parameters``.
        coefficients: by ready-made coefficients, one array a level; empty if the layer's own gate
            made them.
    """

    input: Array | None
    parameters: dict[str, Array]
    coefficients: tuple[Array, ...] = ()


class Layer:
    """What the layers share: parameters by canonical name, and experts of given coefficients."""

    # the name in checkpoints, also of classes that users derive
    _kind: ClassVar[str]

    backend: ClassVar[NumpyLikeBackend] = BACKEND
    config: LayerConfig
    parameters: dict[str, Array]
    buffers: dict[str, Array]

    _repr_html_ = layer_html

    @property
    def spec(self) -> LayerSpec:
        """Sizes and factorization."""
        return self.config.spec

    @property
    def gate(self) -> Gate | None:
        """How inputs become coefficients."""
        return self.config.gate

    @property
    def factors(self) -> dict[str, Array]:
        """The factors and the bias by their short names, as TensorLy's layouts take them."""
        named = (name.partition(".") for name in self.parameters)
        return {
            short: self.parameters[f"factors.{short}"] for k, _, short in named if k == "factors"
        }

    @property
    def arrays(self) -> dict[str, Array]:
        """Parameters and buffers by canonical name: all that :meth:`restore` needs."""
        return {**self.parameters, **self.buffers}

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the parameters; inputs must have it."""
        dtype: np.dtype[Any] = next(iter(self.parameters.values())).dtype
        return dtype

    @property
    def num_parameters(self) -> int:
        """Trainable entries, the gate's included."""
        return self.config.num_parameters

    def plan(self, batch: int) -> Plan:
        """How the layer runs ``batch`` inputs."""
        return functional.layer_plan(self.config, batch)

    def cost(self, batch: int, *, training: bool = False) -> Cost:
        """What one call costs for ``batch`` inputs, the gate included.

        Peak memory is that of a gate whose logits differ; a wide gate that was never trained needs
        less for its coefficients.
        """
        return functional.layer_cost(
            self.config, batch, self.backend, self.dtype.itemsize, training=training
        )

    def expert(self, *index: int) -> tuple[Array, Array | None]:
        """One expert's matrix (in, out) and bias (out,), without building 𝒲.

        Args:
            index: one number a level.

        Raises:
            ShapeError: another number of levels, or an index out of range.
        """
        return functional.expert_weight(self.config, self.parameters, index, self.backend)

    def materialize(self) -> tuple[Array, Array | None]:
        """𝒲 (experts…, in, out) and the biases (experts…, out), built explicitly: N·I·O entries."""
        return functional.materialize(self.config, self.parameters, self.backend)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a checkpoint that every backend opens; an interrupted save leaves the old file.

        Raises:
            CheckpointError: the folder is missing or the file cannot be written.
        """
        save_checkpoint(path, self.config.block, self.config.to_dict(), self.arrays)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """The layer of a checkpoint, whichever backend wrote it.

        Raises:
            CheckpointError: no checkpoint, another kind of layer, or arrays that do not fit; the
                message lists every difference.
        """
        config, arrays = read_block(path, cls._kind, LayerConfig, cls.backend)
        return cls.restore(config, arrays)

    @classmethod
    def restore(cls, config: LayerConfig, arrays: Mapping[str, Array]) -> Self:
        """A layer of arrays that exist already; they are used as they are, not copied.

        Args:
            config: the layer.
            arrays: parameters and buffers by canonical name.

        Raises:
            BackendError: arrays of another library.
            CheckpointError: names or shapes that are not the layer's; lists every difference.
            ShapeError: parameters of different dtypes, or of one that no layer has.
        """
        check_config(config, cls._kind)
        check_arrays(config, arrays, cls.backend, FLOATS)
        layer = cls.__new__(cls)
        layer.config = config
        layer._adopt(arrays)
        return layer

    def _adopt(self, arrays: Mapping[str, Array]) -> None:
        self.parameters = {name: arrays[name] for name in self.config.parameter_shapes()}
        self.buffers = {name: arrays[name] for name in self.config.buffer_shapes()}

    def _arguments(self) -> str:
        spec = self.config.spec
        experts = spec.experts[0] if spec.levels == 1 else spec.experts
        return (
            f"experts={experts}, factorization={spec.factorization!r}, bias={spec.bias}, "
            f"gate={self.gate!r}, dtype={self.dtype.name!r}"
        )

    def _merged(self, coefficients: Given, lead: tuple[int, ...]) -> list[Any]:
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
