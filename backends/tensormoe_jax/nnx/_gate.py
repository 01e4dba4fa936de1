"""The gate of a layer as a module of its own: from inputs to coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from flax import nnx
from jax import Array

from tensormoe._layers import Methods
from tensormoe.functional import BlockConfig, LayerConfig, own_gate
from tensormoe.gates import Gate
from tensormoe_jax import _pure

__all__ = ["ExpertGate", "Gated"]

C = TypeVar("C", bound=LayerConfig | BlockConfig)


class ExpertGate(nnx.Module):
    """Projection, normalization and activation: (..., in) to one array (..., N_e) per level.

    A layer makes its own. Its parameters are ``projection_<level>`` (in, N_e) and, if the gate has
    one, ``bias_<level>`` (N_e,), each an ``nnx.Param``; its statistics are batch norm's
    ``running_mean_<level>`` and ``running_variance_<level>``, each an ``nnx.BatchStat``. Logits
    and coefficients are float32 at least.

    Args:
        config: the layer, which has a gate.
        arrays: parameters and statistics by canonical name (``gate.projection_0``).
        use_running_average: whether batch norm uses its statistics instead of the batch's own;
            ``train()`` and ``eval()`` set it.

    Attributes:
        use_running_average: as the argument; gates without batch norm have no use for it.

    >>> import jax.numpy as jnp
    >>> from tensormoe_jax.nnx import MuMoE
    >>> (coefficients,) = MuMoE(8, 4, experts=3, rank=2, rngs=0).gate(jnp.ones((5, 8)))
    >>> coefficients.shape
    (5, 3)
    """

    def __init__(
        self,
        config: LayerConfig,
        arrays: Mapping[str, Array],
        *,
        use_running_average: bool = False,
    ) -> None:
        self.config = config
        self.use_running_average = use_running_average
        for name in self._parameter_names:
            setattr(self, name.removeprefix("gate."), nnx.Param(arrays[name]))
        for name in config.buffer_shapes():
            setattr(self, name.removeprefix("gate."), nnx.BatchStat(arrays[name]))

    @property
    def gate(self) -> Gate:
        """Rule from logits to coefficients."""
        assert self.config.gate is not None
        return self.config.gate

    @property
    def parameters(self) -> dict[str, Array]:
        """The trainable arrays by canonical name."""
        return {name: self._variable(name).get_value() for name in self._parameter_names}

    @property
    def buffers(self) -> dict[str, Array]:
        """Batch norm's running statistics by canonical name."""
        return {name: self._variable(name).get_value() for name in self.config.buffer_shapes()}

    def __call__(self, x: Array, use_running_average: bool | None = None) -> tuple[Array, ...]:
        """The coefficients of inputs (..., in): one array (..., N_e) per level.

        Rows sum to one if ``gate.sums_to_one``.

        Args:
            x: (..., in), in the layer's dtype.
            use_running_average: takes the place of the attribute. Where it is false, a batch-norm
                gate uses the batch's own statistics and updates its variables.

        Raises:
            BackendError, ShapeError: the input does not fit.
        """
        stored = self.use_running_average if use_running_average is None else use_running_average
        made, buffers = _pure.coefficients(
            self.config, self.parameters, x, buffers=self.buffers, training=not stored
        )
        if not stored:
            for name, array in buffers.items():
                self._variable(name)[...] = array
        return made

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Attributes that ``nnx.view`` sets.

        Args:
          use_running_average: whether batch norm uses its statistics instead of the batch's own.
        """
        # arguments are indented as nnx.view_info reads them
        if use_running_average is not None:
            self.use_running_average = use_running_average

    @property
    def _parameter_names(self) -> list[str]:
        return [name for name in self.config.parameter_shapes() if name.startswith("gate.")]

    def _variable(self, name: str) -> nnx.Variable[Array]:
        variable: nnx.Variable[Array] = getattr(self, name.removeprefix("gate."))
        return variable


class Gated(Methods[Array, C]):
    """Layers and blocks with a gate of their own."""

    gate: ExpertGate | None

    def coefficients(
        self, x: Array, *, use_running_average: bool | None = None
    ) -> tuple[Array, ...]:
        """The coefficients of inputs (..., in): one array (..., N_e) per level.

        Rows sum to one if ``gate.sums_to_one``. Both layers of a block share them.

        Args:
            x: (..., in), in the layer's dtype.
            use_running_average: as for the gate.

        Raises:
            BackendError, ShapeError: the input does not fit, or there is no gate.
        """
        return own_gate(self.gate, self.config)(x, use_running_average)
