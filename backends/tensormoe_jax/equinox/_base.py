"""What the modules share: factors by name, and checkpoints."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from os import PathLike
from typing import Any, ClassVar, Self

import equinox as eqx
from equinox.nn import State
from jax import Array

from tensormoe.checkpoint import check_config, read_block, save_checkpoint
from tensormoe.functional import LayerConfig
from tensormoe_jax._adapter import BACKEND
from tensormoe_jax._layers import Layer, ready
from tensormoe_jax._pure import split_names
from tensormoe_jax.equinox._gate import ExpertGate

__all__ = ["Mixture"]


class Mixture(Layer, eqx.nn.StatefulLayer):
    """What the layers share; ``equinox.nn.Sequential`` hands a state to those that need one."""

    # the name in checkpoints, also of classes that users derive
    _kind: ClassVar[str]

    factors: dict[str, Array]
    gate: ExpertGate | None
    config: LayerConfig = eqx.field(static=True)

    def __init__(
        self, config: LayerConfig, arrays: Mapping[str, Array], axis_name: Hashable = None
    ) -> None:
        self.config = config
        self.factors = split_names(arrays)["factors"]
        self.gate = None if config.gate is None else ExpertGate(config, arrays, axis_name)

    def is_stateful(self) -> bool:
        """Whether a call needs a state: for the statistics of batch norm."""
        return self.gate is not None and bool(self.gate.statistics)

    @property
    def parameters(self) -> dict[str, Array]:
        """The trainable arrays by canonical name, as the functional form takes them."""
        named = {f"factors.{name}": self.factors[name] for name in self.spec.shapes}
        return named if self.gate is None else named | self.gate.parameters

    def buffers(self, state: State | None = None) -> dict[str, Array]:
        """Batch norm's running statistics by canonical name.

        Args:
            state: what holds them; the first values, which ``equinox.nn.make_with_state`` takes out
                of the module, for None.
        """
        return {} if self.gate is None else self.gate.buffers(state)

    def save(self, path: str | PathLike[str], state: State | None = None) -> None:
        """Write a checkpoint that every backend opens; an interrupted save leaves the old file.

        Args:
            path: the file.
            state: running statistics of batch norm.

        Raises:
            CheckpointError: the folder is missing or the file cannot be written.
            GateError: batch norm without a state.
        """
        arrays = self.parameters | self.buffers(state)
        save_checkpoint(path, self.config.block, self.config.to_dict(), arrays)

    @classmethod
    def load(cls, path: str | PathLike[str], *, axis_name: Hashable = None) -> Self:
        """The layer of a checkpoint, whichever backend wrote it.

        Args:
            path: the file.
            axis_name: as for the constructor.

        Raises:
            CheckpointError: no checkpoint, another kind of layer, or arrays that do not fit; the
                message lists every difference.
        """
        config, arrays = read_block(path, cls._kind, LayerConfig, BACKEND)
        return cls.restore(config, arrays, axis_name=axis_name)

    @classmethod
    def restore(
        cls, config: LayerConfig, arrays: Mapping[str, Array], *, axis_name: Hashable = None
    ) -> Self:
        """A layer of arrays that exist already; they are used as they are, not copied.

        Args:
            config: the layer.
            arrays: parameters and buffers by canonical name. ``equinox.nn.make_with_state`` takes
                buffers to the state, as for a constructor.
            axis_name: as for the constructor.

        Raises:
            BackendError: arrays of another library.
            CheckpointError: names or shapes that are not the layer's; lists every difference.
            ShapeError: parameters of different dtypes, or of one that no layer has.
        """
        check_config(config, cls._kind)
        spec = config.spec
        sizes = (spec.in_features, spec.out_features, spec.experts)
        # an embedding takes none
        named = {} if axis_name is None else {"axis_name": axis_name}
        constructor: Any = cls
        layer: Self = constructor(*sizes, **named, key=ready(config, arrays))
        return layer
