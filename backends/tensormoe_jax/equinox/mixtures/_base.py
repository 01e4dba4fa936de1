"""Mixtures whose experts are run one by one, as modules of Equinox."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, Self, TypeVar

import equinox as eqx
from equinox.nn import State, StateIndex
from jax import Array

from tensormoe.checkpoint import save_checkpoint
from tensormoe.errors import GateError
from tensormoe.mixtures import MixtureConfig
from tensormoe_jax._layers import built, first_values
from tensormoe_jax._mixtures import MixtureLayer, forward_mixture, route_mixture, run_mixture

M = TypeVar("M", bound=MixtureConfig)

_KEEPS = "balance keeps its arrays in an equinox.nn.State; got none."


class MixtureModule(MixtureLayer[M], eqx.Module):
    """Modules of mixtures.

    Attributes:
        arrays: the trainable arrays by canonical name.
        statistics: where the state keeps the buffers of a router with ``balance``; None without.
        inference: whether no noise is added, and nothing moves; ``equinox.nn.inference_mode`` sets
            it.
    """

    arrays: dict[str, Array]
    statistics: StateIndex[tuple[Array, ...]] | None
    inference: bool
    config: M = eqx.field(static=True)

    def __init__(self, config: M, arrays: Mapping[str, Array]) -> None:
        self.config = config
        self.arrays = {name: arrays[name] for name in config.parameter_shapes()}
        kept = config.buffer_shapes()
        self.statistics = StateIndex(tuple(arrays[name] for name in kept)) if kept else None
        self.inference = False

    @property
    def parameters(self) -> dict[str, Array]:
        """The trainable arrays by canonical name."""
        return self.arrays

    def buffers(self, state: State | None = None) -> dict[str, Array]:
        """The arrays that are kept but not trained by canonical name.

        Args:
            state: what holds them; the initial values, which ``equinox.nn.make_with_state`` takes
                out of the module, for None.

        Raises:
            GateError: a router with ``balance`` without a state.
        """
        if self.statistics is None:
            return {}
        kept = self.statistics.init if state is None else state.get(self.statistics)
        if not isinstance(kept, tuple):
            raise GateError(f"{_KEEPS} Pass state=…, of equinox.nn.make_with_state.")
        return dict(zip(self.config.buffer_shapes(), kept, strict=True))

    def route(
        self,
        x: Array,
        state: State | None = None,
        *,
        key: Array | None = None,
        inference: bool | None = None,
    ) -> Any:
        """The routing record of tokens (..., in), and the state afterwards if one was given.

        Args:
            x: (..., in), in the mixture's dtype.
            state: biases of a router with ``balance``, which needs one.
            key: what a router's noise is drawn by, in training.
            inference: takes the place of the attribute.

        Raises:
            BackendError, ShapeError: the input does not fit.
            GateError: a router with ``balance`` without a state.
            SpecError: noise is to be drawn, and there is no key.
        """
        return self._called(route_mixture, x, state, key, inference)

    def _called(
        self,
        function: Callable[..., tuple[Any, dict[str, Array]]],
        x: Array,
        state: State | None,
        key: Array | None,
        inference: bool | None,
    ) -> Any:
        """Result of a function of all arrays, and the state afterwards if one was given."""
        if self.statistics is not None and state is None:
            raise GateError(
                f"{_KEEPS} Make the layer by equinox.nn.make_with_state, and call it with state=…."
            )
        stored = self.inference if inference is None else inference
        arrays = self.arrays | self.buffers(state)
        found, changed = function(self.config, arrays, x, training=not stored, key=key)
        if changed and state is not None and self.statistics is not None:
            state = state.set(self.statistics, tuple(changed.values()))
        return found if state is None else (found, state)

    def __call__(
        self,
        x: Array,
        routes: Any = None,
        state: State | None = None,
        *,
        key: Array | None = None,
        inference: bool | None = None,
    ) -> Any:
        """Run the mixture: (..., in) → (..., out), and the state afterwards if one was given.

        Args:
            x: (..., in), in the mixture's dtype.
            routes: the record that :meth:`route` returned for these tokens; made anew otherwise.
            state: as for :meth:`route`.
            key: as for :meth:`route`.
            inference: takes the place of the attribute.

        Raises:
            BackendError, GateError, ShapeError, SpecError: as :meth:`route`; or a record that does
                not fit.
        """
        if routes is None:
            return self._called(forward_mixture, x, state, key, inference)
        y = run_mixture(self.config, self.arrays, x, routes)
        return y if state is None else (y, state)

    def save(self, path: str | PathLike[str], state: State | None = None) -> None:
        """Write a checkpoint that every backend opens; an interrupted save leaves the old file.

        Args:
            path: the file.
            state: biases of a router with ``balance``.

        Raises:
            CheckpointError: the folder is missing or the file cannot be written.
            GateError: a router with ``balance`` without a state.
        """
        arrays = {**self.arrays, **self.buffers(state)}
        save_checkpoint(path, self._kind, self.config.to_dict(), arrays)

    @classmethod
    def _of_arrays(cls, config: M, arrays: Mapping[str, Array]) -> Self:
        return built(cls, MixtureModule, config, arrays)

    def _start(self, config: M, init: str, dtype: Any, router_dtype: Any, key: Array) -> None:
        MixtureModule.__init__(self, config, first_values(config, key, init, dtype, router_dtype))
