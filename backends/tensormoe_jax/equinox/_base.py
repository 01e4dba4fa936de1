"""Modules of one mixture, and what they share with blocks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from os import PathLike
from typing import Self, TypeVar

import equinox as eqx
from equinox.nn import State
from jax import Array

from tensormoe._layers import Methods
from tensormoe._names import split_names
from tensormoe.checkpoint import save_checkpoint
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe_jax._layers import Layer, built
from tensormoe_jax._specs import MeshCut
from tensormoe_jax.equinox._gate import ExpertGate

__all__ = ["Mixture", "Stateful"]

C = TypeVar("C", bound=LayerConfig | BlockConfig)


class Stateful(Methods[Array, C], eqx.Module):
    """Layers and blocks whose gate may need a state: statistics of batch norm, biases."""

    gate: eqx.AbstractVar[ExpertGate | None]

    def is_stateful(self) -> bool:
        """Whether a call needs a state: for the statistics of batch norm, or ``balance``."""
        return self.gate is not None and bool(self.gate.statistics)

    def buffers(self, state: State | None = None) -> dict[str, Array]:
        """Batch norm's running statistics by canonical name.

        Args:
            state: what holds them; the initial values, which ``equinox.nn.make_with_state`` takes
                out of the module, for None.
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
            SpecError: a block whose activation has no name.
        """
        arrays = {**self._weights(), **self.buffers(state)}
        save_checkpoint(path, self._kind, self._saved_config().to_dict(), arrays)

    @classmethod
    def load(cls, path: str | PathLike[str], *, axis_name: Hashable = None) -> Self:
        """The layer or block of a checkpoint, whichever backend wrote it.

        Args:
            path: the file.
            axis_name: as for the constructor.

        Raises:
            CheckpointError: not a checkpoint, another kind of layer, or arrays that do not fit; the
                message lists every difference.
        """
        return cls.restore(*cls._read(path), axis_name=axis_name)

    @classmethod
    def restore(cls, config: C, arrays: Mapping[str, Array], *, axis_name: Hashable = None) -> Self:
        """A layer or block of arrays that exist already; they are used as they are, not copied.

        Args:
            config: the layer or block.
            arrays: parameters and buffers by canonical name. ``equinox.nn.make_with_state`` takes
                buffers to the state, as for a constructor.
            axis_name: as for the constructor.

        Raises:
            BackendError: arrays of another library.
            CheckpointError: names or shapes that are not the layer's; lists every difference.
            ShapeError: parameters of different dtypes, or of one that no layer has.
            SpecError: the configuration of another kind of layer.
        """
        cls._check(config, arrays)
        return cls._of_arrays(config, arrays, axis_name)

    @classmethod
    def _of_arrays(cls, config: C, arrays: Mapping[str, Array], axis_name: Hashable = None) -> Self:
        raise NotImplementedError


class Mixture(Stateful[LayerConfig], Layer):
    """Layers of one mixture."""

    factors: dict[str, Array]
    gate: ExpertGate | None
    config: LayerConfig = eqx.field(static=True)
    cut: MeshCut | None = eqx.field(static=True)

    def __init__(
        self, config: LayerConfig, arrays: Mapping[str, Array], axis_name: Hashable = None
    ) -> None:
        self.config = config
        self.cut = None
        self.factors = split_names(arrays)["factors"]
        self.gate = None if config.gate is None else ExpertGate(config, arrays, axis_name)

    @property
    def parameters(self) -> dict[str, Array]:
        """The trainable arrays by canonical name, as the functional form takes them."""
        named = {f"factors.{name}": self.factors[name] for name in self.spec.shapes}
        return named if self.gate is None else named | self.gate.parameters

    @classmethod
    def _of_arrays(
        cls, config: LayerConfig, arrays: Mapping[str, Array], axis_name: Hashable = None
    ) -> Self:
        return built(cls, Mixture, config, arrays, axis_name)
