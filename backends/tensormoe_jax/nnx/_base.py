"""What the modules share: factors by name, and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar, Self

from flax import nnx
from jax import Array

from tensormoe.checkpoint import check_config, read_block, save_checkpoint
from tensormoe.functional import LayerConfig
from tensormoe_jax._adapter import BACKEND
from tensormoe_jax._layers import Layer, ready
from tensormoe_jax._pure import split_names
from tensormoe_jax.nnx._gate import ExpertGate

__all__ = ["Mixture"]


class Mixture(Layer, nnx.Module):
    """What the layers share; a path of a variable in ``nnx.state`` is its canonical name."""

    # the name in checkpoints, also of classes that users derive
    _kind: ClassVar[str]

    factors: nnx.Dict[Any]
    gate: ExpertGate | None

    def __init__(self, config: LayerConfig, arrays: Mapping[str, Array]) -> None:
        self.config = config
        named = split_names(arrays)["factors"]
        self.factors = nnx.Dict({name: nnx.Param(named[name]) for name in config.spec.shapes})
        self.gate = None if config.gate is None else ExpertGate(config, arrays)

    @property
    def parameters(self) -> dict[str, Array]:
        """The trainable arrays by canonical name, as the functional form takes them."""
        named = {f"factors.{name}": self.factors[name].get_value() for name in self.spec.shapes}
        return named if self.gate is None else named | self.gate.parameters

    @property
    def buffers(self) -> dict[str, Array]:
        """Batch norm's running statistics by canonical name."""
        return {} if self.gate is None else self.gate.buffers

    def save(self, path: str | PathLike[str]) -> None:
        """Write a checkpoint that every backend opens; an interrupted save leaves the old file.

        Raises:
            CheckpointError: the folder is missing or the file cannot be written.
        """
        arrays = self.parameters | self.buffers
        save_checkpoint(path, self.config.block, self.config.to_dict(), arrays)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """The layer of a checkpoint, whichever backend wrote it.

        Raises:
            CheckpointError: no checkpoint, another kind of layer, or arrays that do not fit; the
                message lists every difference.
        """
        config, arrays = read_block(path, cls._kind, LayerConfig, BACKEND)
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
        spec = config.spec
        constructor: Any = cls
        layer: Self = constructor(
            spec.in_features, spec.out_features, spec.experts, rngs=ready(config, arrays)
        )
        return layer
