"""The gate of a layer as a module of its own: from inputs to coefficients."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar, overload

import equinox as eqx
from equinox.nn import State, StateIndex
from jax import Array

from tensormoe._layers import Methods
from tensormoe.errors import GateError
from tensormoe.functional import BlockConfig, LayerConfig, own_gate
from tensormoe.gates import Gate
from tensormoe_jax import _pure

__all__ = ["ExpertGate", "Gated"]

C = TypeVar("C", bound=LayerConfig | BlockConfig)


class ExpertGate(eqx.Module):
    """Projection, normalization and activation: (..., in) to one array (..., N_e) per level.

    A layer makes its own. Logits and coefficients are float32 at least. Batch norm keeps its
    running statistics in an ``equinox.nn.State``, as ``equinox.nn.BatchNorm`` does.

    Args:
        config: the layer, which has a gate.
        arrays: parameters and statistics by canonical name (``gate.projection_0``).
        axis_name: axes of ``jax.vmap`` that are part of the batch.

    Attributes:
        projections: (in, N_e) a level, ``gate.projection_<level>`` in checkpoints.
        biases: (N_e,) a level, ``gate.bias_<level>``; empty for a gate without bias.
        statistics: where the state keeps mean and variance (N_e,) of a level; empty for a gate
            without batch norm.
        inference: whether batch norm uses its statistics instead of the batch's own;
            ``equinox.nn.inference_mode`` sets it.

    >>> import jax, jax.numpy as jnp
    >>> from tensormoe_jax.equinox import MuMoE
    >>> gate = MuMoE(8, 4, experts=3, rank=2, key=jax.random.key(0)).gate
    >>> gate(jnp.ones((5, 8)))[0].shape
    (5, 3)
    """

    projections: tuple[Array, ...]
    biases: tuple[Array, ...]
    statistics: tuple[StateIndex[tuple[Array, Array]], ...]
    inference: bool
    config: LayerConfig = eqx.field(static=True)
    axis_name: Hashable = eqx.field(static=True)

    def __init__(
        self, config: LayerConfig, arrays: Mapping[str, Array], axis_name: Hashable = None
    ) -> None:
        levels = range(config.spec.levels)
        bias, batch = config.gate and config.gate.bias, config.buffer_shapes()
        self.config = config
        self.projections = tuple(arrays[f"gate.projection_{level}"] for level in levels)
        self.biases = tuple(arrays[f"gate.bias_{level}"] for level in levels if bias)
        self.statistics = tuple(
            StateIndex(
                (arrays[f"gate.running_mean_{level}"], arrays[f"gate.running_variance_{level}"])
            )
            for level in levels
            if batch
        )
        self.inference = False
        self.axis_name = axis_name

    @property
    def gate(self) -> Gate:
        """Rule from logits to coefficients."""
        assert self.config.gate is not None
        return self.config.gate

    @property
    def parameters(self) -> dict[str, Array]:
        """The trainable arrays by canonical name."""
        named: dict[str, Array] = {}
        for level, projection in enumerate(self.projections):
            named[f"gate.projection_{level}"] = projection
            if self.biases:
                named[f"gate.bias_{level}"] = self.biases[level]
        return named

    def buffers(self, state: State | None = None) -> dict[str, Array]:
        """Batch norm's running statistics by canonical name.

        Args:
            state: what holds them; the initial values, which ``equinox.nn.make_with_state`` takes
                out of the module, for None.

        Raises:
            GateError: batch norm without a state.
        """
        named: dict[str, Array] = {}
        for level, index in enumerate(self.statistics):
            kept = index.init if state is None else state.get(index)
            if not isinstance(kept, tuple):
                raise GateError(
                    "batch norm keeps its running statistics in an equinox.nn.State; got none. "
                    "Pass state=…, of equinox.nn.make_with_state."
                )
            named[f"gate.running_mean_{level}"], named[f"gate.running_variance_{level}"] = kept
        return named

    @overload
    def __call__(
        self, x: Array, state: None = None, *, key: Any = None, inference: bool | None = None
    ) -> tuple[Array, ...]: ...

    @overload
    def __call__(
        self, x: Array, state: State, *, key: Any = None, inference: bool | None = None
    ) -> tuple[tuple[Array, ...], State]: ...

    def __call__(
        self,
        x: Array,
        state: State | None = None,
        *,
        key: Any = None,
        inference: bool | None = None,
    ) -> tuple[Array, ...] | tuple[tuple[Array, ...], State]:
        """The coefficients of inputs (..., in): one array (..., N_e) per level.

        Rows sum to one if ``gate.sums_to_one``.

        Args:
            x: (..., in), in the layer's dtype.
            state: running statistics of batch norm, which needs one.
            key: ignored.
            inference: takes the place of the attribute. Where it is false, batch norm uses the
                batch's own statistics.

        Returns:
            The coefficients, and the state afterwards if one was given.

        Raises:
            BackendError, ShapeError: the input does not fit.
            GateError: batch norm without a state.
        """
        if self.statistics and state is None:
            raise GateError(
                "batch norm keeps its running statistics in an equinox.nn.State; got none. Make "
                "the layer by equinox.nn.make_with_state, and call it with state=…."
            )
        stored = self.inference if inference is None else inference
        made, buffers = _pure.coefficients(
            self.config,
            self.parameters,
            x,
            buffers=self.buffers(state),
            training=not stored,
            axis_name=self.axis_name,
        )
        if state is None:
            return made
        for level, index in enumerate(() if stored else self.statistics):
            names = f"gate.running_mean_{level}", f"gate.running_variance_{level}"
            state = state.set(index, (buffers[names[0]], buffers[names[1]]))
        return made, state


class Gated(Methods[Array, C]):
    """Layers and blocks with a gate of their own."""

    gate: ExpertGate | None

    @overload
    def coefficients(
        self, x: Array, state: None = None, *, inference: bool | None = None
    ) -> tuple[Array, ...]: ...

    @overload
    def coefficients(
        self, x: Array, state: State, *, inference: bool | None = None
    ) -> tuple[tuple[Array, ...], State]: ...

    def coefficients(
        self, x: Array, state: State | None = None, *, inference: bool | None = None
    ) -> tuple[Array, ...] | tuple[tuple[Array, ...], State]:
        """The coefficients of inputs (..., in): one array (..., N_e) per level.

        Rows sum to one if ``gate.sums_to_one``. Both layers of a block share them.

        Args:
            x: (..., in), in the layer's dtype.
            state: running statistics of batch norm.
            inference: takes the place of the gate's attribute.

        Returns:
            The coefficients, and the state afterwards if one was given.

        Raises:
            BackendError, ShapeError: the input does not fit, or there is no gate.
            GateError: batch norm without a state.
        """
        return own_gate(self.gate, self.config)(x, state, inference=inference)
