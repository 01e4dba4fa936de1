"""Modules of one mixture: factors by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from flax import nnx
from jax import Array

from tensormoe._names import split_names
from tensormoe.functional import LayerConfig
from tensormoe_jax._layers import Layer, built
from tensormoe_jax.nnx._gate import ExpertGate

__all__ = ["Mixture"]


class Mixture(Layer, nnx.Module):
    """Layers of one mixture; a path of a variable in ``nnx.state`` is its canonical name."""

    factors: nnx.Dict[Any]
    gate: ExpertGate | None

    def __init__(
        self, config: LayerConfig, arrays: Mapping[str, Array], rngs: nnx.Rngs | None = None
    ) -> None:
        self.config = config
        self.cut = None
        named = split_names(arrays)["factors"]
        self.factors = nnx.Dict({name: nnx.Param(named[name]) for name in config.spec.shapes})
        self.gate = None if config.gate is None else ExpertGate(config, arrays, rngs=rngs)

    @property
    def parameters(self) -> dict[str, Array]:
        """The trainable arrays by canonical name, as the functional form takes them."""
        named = {f"factors.{name}": self.factors[name].get_value() for name in self.spec.shapes}
        return named if self.gate is None else named | self.gate.parameters

    @property
    def buffers(self) -> dict[str, Array]:
        """Batch norm's running statistics by canonical name."""
        return {} if self.gate is None else self.gate.buffers

    @classmethod
    def _of_arrays(cls, config: LayerConfig, arrays: Mapping[str, Array]) -> Self:
        return built(cls, Mixture, config, arrays)

    def _saved_arrays(self) -> dict[str, Array]:
        return self.parameters | self.buffers
