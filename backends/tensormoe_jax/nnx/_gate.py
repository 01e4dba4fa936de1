"""The gate of a layer as a module of its own: from inputs to coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from flax import nnx
from jax import Array

from tensormoe._layers import Methods
from tensormoe.errors import GateError
from tensormoe.functional import BlockConfig, LayerConfig, own_gate
from tensormoe.gates import Gate
from tensormoe_jax import _pure
from tensormoe_jax.nnx._rngs import noise_stream

__all__ = ["ExpertGate", "Gated"]

C = TypeVar("C", bound=LayerConfig | BlockConfig)


class ExpertGate(nnx.Module):
    """Projection, normalization and activation: (..., in) to one array (..., N_e) per level.

    A layer makes its own. Its parameters are ``projection_<level>`` (in, N_e) and, if the gate has
    one, ``bias_<level>`` (N_e,), each an ``nnx.Param``; its statistics are batch norm's
    ``running_mean_<level>`` and ``running_variance_<level>``, and with ``balance`` the
    ``choice_bias_<level>``, each an ``nnx.BatchStat``. Logits and coefficients are float32 at
    least.

    Args:
        config: the layer, which has a gate.
        arrays: parameters and statistics by canonical name (``gate.projection_0``).
        use_running_average: whether batch norm uses its statistics instead of the batch's own,
            no noise is added, and nothing moves; ``train()`` and ``eval()`` set it.
        rngs: streams that the noise is drawn by, from the one named ``noise`` or the default one;
            only a gate with ``noise`` keeps it.

    Attributes:
        use_running_average: as the argument; gates without batch norm, noise and balance have no
            use for it.
        rngs: the stream of the noise, or None.

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
        rngs: nnx.Rngs | None = None,
    ) -> None:
        self.config = config
        # a gate without noise needs no state for it
        noisy = config.gate is not None and config.gate.noise > 0
        self.rngs = nnx.data(noise_stream(rngs) if noisy and rngs is not None else None)
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

    @property
    def variables(self) -> dict[str, nnx.Variable[Array]]:
        """Parameters and buffers by canonical name, as variables."""
        names = *self._parameter_names, *self.config.buffer_shapes()
        return {name: self._variable(name) for name in names}

    def __call__(self, x: Array, use_running_average: bool | None = None) -> tuple[Array, ...]:
        """The coefficients of inputs (..., in): one array (..., N_e) per level.

        Rows sum to one if ``gate.sums_to_one``.

        Args:
            x: (..., in), in the layer's dtype.
            use_running_average: takes the place of the attribute. Where it is false, a batch-norm
                gate uses the batch's own statistics, one with ``noise`` draws it, and variables
                are updated.

        Raises:
            BackendError, ShapeError: the input does not fit.
            GateError: noise is to be drawn, and the gate was made without ``rngs``.
        """
        return self.route(x, use_running_average)[0]

    def route(
        self, x: Array, use_running_average: bool | None = None
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Coefficients and logits, one array (..., N_e) per level each.

        Args:
            x: (..., in), in the layer's dtype.
            use_running_average: as for a call.

        Raises:
            BackendError, GateError, ShapeError: as a call.
        """
        stored = self.use_running_average if use_running_average is None else use_running_average
        key = None
        if self.gate.noise and not stored:
            if self.rngs is None:
                raise GateError(
                    f"a gate with noise={self.gate.noise} needs random numbers in training; got "
                    "none. Pass rngs=… where the layer is made, restored or loaded, or call eval()."
                )
            key = self.rngs()
        made, buffers = _pure.route(
            self.config, self.parameters, x, buffers=self.buffers, training=not stored, key=key
        )
        if not stored:
            for name, array in buffers.items():
                self._variable(name)[...] = array
        return made

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Attributes that ``nnx.view`` sets.

        Args:
          use_running_average: whether batch norm uses its statistics instead of the batch's own,
            no noise is added, and nothing moves.
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

    def route(
        self, x: Array, *, use_running_average: bool | None = None
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Coefficients and logits of inputs (..., in): one array (..., N_e) per level each.

        Logits are those of the projection, before normalization, noise and the choice of experts.
        Losses are made of both, and the coefficients are given to the layer, so that a step
        computes them once.

        Args:
            x: (..., in), in the layer's dtype.
            use_running_average: as for the gate.

        Raises:
            BackendError, ShapeError: the input does not fit, or there is no gate.
            GateError: noise is to be drawn, and the gate was made without ``rngs``.
        """
        return own_gate(self.gate, self.config).route(x, use_running_average)
