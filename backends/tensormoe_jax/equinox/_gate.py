"""The gate of a layer as a module of its own: from inputs to coefficients."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypeAlias, TypeVar, overload

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

Routes: TypeAlias = tuple[tuple[Array, ...], tuple[Array, ...]]
"""Coefficients and logits, one array per level each."""

_KEEPS = "batch norm and balance keep their arrays in an equinox.nn.State; got none."


class ExpertGate(eqx.Module):
    """Projection, normalization and activation: (..., in) to one array (..., N_e) per level.

    A layer makes its own. Logits and coefficients are float32 at least. Batch norm keeps its
    running statistics in an ``equinox.nn.State``, as ``equinox.nn.BatchNorm`` does, and a gate with
    ``balance`` its biases.

    Args:
        config: the layer, which has a gate.
        arrays: parameters and statistics by canonical name (``gate.projection_0``).
        axis_name: axes of ``jax.vmap`` that are part of the batch.

    Attributes:
        projections: (in, N_e) per level, ``gate.projection_<level>`` in checkpoints.
        biases: (N_e,) per level, ``gate.bias_<level>``; empty for a gate without bias.
        statistics: where the state keeps a level's buffers (N_e,): mean and variance, biases;
            empty for a gate without batch norm and balance.
        inference: whether batch norm uses its statistics instead of the batch's own, no noise is
            added, and nothing moves; ``equinox.nn.inference_mode`` sets it.

    >>> import jax, jax.numpy as jnp
    >>> from tensormoe_jax.equinox import MuMoE
    >>> gate = MuMoE(8, 4, experts=3, rank=2, key=jax.random.key(0)).gate
    >>> gate(jnp.ones((5, 8)))[0].shape
    (5, 3)
    """

    projections: tuple[Array, ...]
    biases: tuple[Array, ...]
    statistics: tuple[StateIndex[tuple[Array, ...]], ...]
    inference: bool
    config: LayerConfig = eqx.field(static=True)
    axis_name: Hashable = eqx.field(static=True)

    def __init__(
        self, config: LayerConfig, arrays: Mapping[str, Array], axis_name: Hashable = None
    ) -> None:
        levels = range(config.spec.levels)
        bias, kept = config.gate and config.gate.bias, config.buffer_shapes()
        self.config = config
        self.projections = tuple(arrays[f"gate.projection_{level}"] for level in levels)
        self.biases = tuple(arrays[f"gate.bias_{level}"] for level in levels if bias)
        self.statistics = tuple(
            StateIndex(tuple(arrays[name] for name in _buffer_names(config, level)))
            for level in levels
            if kept
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
        """Batch norm's running statistics, and the biases of ``balance``, by canonical name.

        Args:
            state: what holds them; the initial values, which ``equinox.nn.make_with_state`` takes
                out of the module, for None.

        Raises:
            GateError: batch norm or balance without a state.
        """
        named: dict[str, Array] = {}
        for level, index in enumerate(self.statistics):
            kept = index.init if state is None else state.get(index)
            if not isinstance(kept, tuple):
                raise GateError(f"{_KEEPS} Pass state=…, of equinox.nn.make_with_state.")
            named |= dict(zip(_buffer_names(self.config, level), kept, strict=True))
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
            state: running statistics of batch norm, which needs one, and biases of ``balance``.
            key: what a gate's noise is drawn by, in training.
            inference: takes the place of the attribute. Where it is false, batch norm uses the
                batch's own statistics, noise is added, and the state changes.

        Returns:
            The coefficients, and the state afterwards if one was given.

        Raises:
            BackendError, ShapeError: the input does not fit.
            GateError: batch norm or balance without a state.
            SpecError: noise is to be drawn, and there is no key.
        """
        (made, _), after = self._route(x, state, key, inference)
        return made if after is None else (made, after)

    @overload
    def route(
        self, x: Array, state: None = None, *, key: Any = None, inference: bool | None = None
    ) -> Routes: ...

    @overload
    def route(
        self, x: Array, state: State, *, key: Any = None, inference: bool | None = None
    ) -> tuple[Routes, State]: ...

    def route(
        self,
        x: Array,
        state: State | None = None,
        *,
        key: Any = None,
        inference: bool | None = None,
    ) -> Routes | tuple[Routes, State]:
        """Coefficients and logits, one array (..., N_e) per level each.

        Args:
            x: (..., in), in the layer's dtype.
            state: as for a call.
            key: as for a call.
            inference: as for a call.

        Returns:
            A pair of coefficients and logits, and the state afterwards if one was given.

        Raises:
            BackendError, GateError, ShapeError, SpecError: as a call.
        """
        made, after = self._route(x, state, key, inference)
        return made if after is None else (made, after)

    def _route(
        self, x: Array, state: State | None, key: Any, inference: bool | None
    ) -> tuple[Routes, State | None]:
        if self.statistics and state is None:
            raise GateError(
                f"{_KEEPS} Make the layer by equinox.nn.make_with_state, and call it with state=…."
            )
        stored = self.inference if inference is None else inference
        made, buffers = _pure.route(
            self.config,
            self.parameters,
            x,
            buffers=self.buffers(state),
            training=not stored,
            axis_name=self.axis_name,
            key=key,
        )
        for level, index in enumerate(() if stored or state is None else self.statistics):
            assert state is not None
            names = _buffer_names(self.config, level)
            state = state.set(index, tuple(buffers[name] for name in names))
        return made, state


class Gated(Methods[Array, C]):
    """Layers and blocks with a gate of their own."""

    gate: ExpertGate | None

    @overload
    def coefficients(
        self, x: Array, state: None = None, *, key: Any = None, inference: bool | None = None
    ) -> tuple[Array, ...]: ...

    @overload
    def coefficients(
        self, x: Array, state: State, *, key: Any = None, inference: bool | None = None
    ) -> tuple[tuple[Array, ...], State]: ...

    def coefficients(
        self,
        x: Array,
        state: State | None = None,
        *,
        key: Any = None,
        inference: bool | None = None,
    ) -> tuple[Array, ...] | tuple[tuple[Array, ...], State]:
        """The coefficients of inputs (..., in): one array (..., N_e) per level.

        Rows sum to one if ``gate.sums_to_one``. Both layers of a block share them.

        Args:
            x: (..., in), in the layer's dtype.
            state: running statistics of batch norm, biases of ``balance``.
            key: what a gate's noise is drawn by, in training.
            inference: takes the place of the gate's attribute.

        Returns:
            The coefficients, and the state afterwards if one was given.

        Raises:
            BackendError, ShapeError: the input does not fit, or there is no gate.
            GateError: batch norm or balance without a state.
            SpecError: noise is to be drawn, and there is no key.
        """
        return own_gate(self.gate, self.config)(x, state, key=key, inference=inference)

    @overload
    def route(
        self, x: Array, state: None = None, *, key: Any = None, inference: bool | None = None
    ) -> Routes: ...

    @overload
    def route(
        self, x: Array, state: State, *, key: Any = None, inference: bool | None = None
    ) -> tuple[Routes, State]: ...

    def route(
        self,
        x: Array,
        state: State | None = None,
        *,
        key: Any = None,
        inference: bool | None = None,
    ) -> Routes | tuple[Routes, State]:
        """Coefficients and logits of inputs (..., in): one array (..., N_e) per level each.

        Logits are those of the projection, before normalization, noise and the choice of experts.
        Losses are made of both, and the coefficients are given to the layer, so that a step
        computes them once.

        Args:
            x: (..., in), in the layer's dtype.
            state: as for :meth:`coefficients`.
            key: as for :meth:`coefficients`.
            inference: as for :meth:`coefficients`.

        Returns:
            A pair of coefficients and logits, and the state afterwards if one was given.

        Raises:
            BackendError, GateError, ShapeError, SpecError: as :meth:`coefficients`.
        """
        return own_gate(self.gate, self.config).route(x, state, key=key, inference=inference)


def _buffer_names(config: LayerConfig, level: int) -> list[str]:
    """Canonical names of a level's buffers."""
    return [name for name in config.buffer_shapes() if name.endswith(f"_{level}")]
