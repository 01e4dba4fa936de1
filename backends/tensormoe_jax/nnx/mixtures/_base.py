"""Mixtures whose experts are run one by one, as modules of Flax."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, Self, TypeVar

from flax import nnx
from jax import Array

from tensormoe.errors import GateError
from tensormoe.mixtures import MixtureConfig
from tensormoe_jax._layers import built, first_values
from tensormoe_jax._mixtures import MixtureLayer, forward_mixture, route_mixture, run_mixture
from tensormoe_jax.nnx._rngs import Source, checked_rngs, noise_stream, parameters_key

M = TypeVar("M", bound=MixtureConfig)


class MixtureModule(MixtureLayer[M], nnx.Module):
    """Modules of mixtures; a path of a variable in ``nnx.state`` is its canonical name.

    Parameters are ``nnx.Param``, buffers ``nnx.BatchStat``.

    Attributes:
        use_running_average: whether no noise is added, and buffers stay; ``train()`` and
            ``eval()`` set it.
        rngs: the stream of a router's noise, or None.
    """

    config: M

    def __init__(
        self, config: M, arrays: Mapping[str, Array], rngs: nnx.Rngs | None = None
    ) -> None:
        self.config = config
        noisy = config.noise_shape(1) is not None and rngs is not None
        self.rngs = nnx.data(noise_stream(rngs) if noisy and rngs is not None else None)
        self.use_running_average = False
        variables: dict[str, Any] = {
            name: nnx.Param(arrays[name]) for name in config.parameter_shapes()
        }
        variables |= {name: nnx.BatchStat(arrays[name]) for name in config.buffer_shapes()}
        for name, part in _nested(variables).items():
            setattr(self, name, part)

    @property
    def parameters(self) -> dict[str, Array]:
        """The trainable arrays by canonical name."""
        return {name: self._variable(name).get_value() for name in self.config.parameter_shapes()}

    @property
    def buffers(self) -> dict[str, Array]:
        """The arrays that are kept but not trained by canonical name."""
        return {name: self._variable(name).get_value() for name in self.config.buffer_shapes()}

    def _variable(self, name: str) -> nnx.Variable[Array]:
        found: Any = self
        for place, part in enumerate(name.split(".")):
            found = found[part] if place else getattr(found, part)
        return found  # type: ignore[no-any-return]

    def route(self, x: Array, *, use_running_average: bool | None = None) -> Any:
        """The routing record of tokens (..., in).

        Args:
            x: (..., in), in the mixture's dtype.
            use_running_average: takes the place of the attribute.

        Raises:
            BackendError, ShapeError: the input does not fit.
            GateError: noise is to be drawn, and the module was made without ``rngs``.
        """
        training, key = self._noise(use_running_average)
        arrays = self.parameters | self.buffers
        routes, changed = route_mixture(self.config, arrays, x, training=training, key=key)
        self._store(changed)
        return routes

    def _store(self, changed: Mapping[str, Array]) -> None:
        for name, array in changed.items():
            self._variable(name)[...] = array

    def _noise(self, use_running_average: bool | None) -> tuple[bool, Array | None]:
        """Whether a call is one of training, and the key of its noise if it has some."""
        stored = self.use_running_average if use_running_average is None else use_running_average
        if stored or self.config.noise_shape(1) is None:
            return not stored, None
        if self.rngs is None:
            raise GateError(
                "a router with noise needs random numbers in training; got none. Pass rngs=… "
                "where the module is made, restored or loaded, or call eval()."
            )
        return True, self.rngs()

    def __call__(
        self, x: Array, routes: Any = None, *, use_running_average: bool | None = None
    ) -> Array:
        """Run the mixture: (..., in) → (..., out).

        Args:
            x: (..., in), in the mixture's dtype.
            routes: the record that :meth:`route` returned for these tokens; made anew otherwise.
            use_running_average: takes the place of the attribute.

        Raises:
            BackendError, ShapeError: input or record do not fit.
        """
        if routes is not None:
            return run_mixture(self.config, self.parameters, x, routes)
        training, key = self._noise(use_running_average)
        arrays = self.parameters | self.buffers
        y, changed = forward_mixture(self.config, arrays, x, training=training, key=key)
        self._store(changed)
        return y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Attributes that ``nnx.view`` sets.

        Args:
          use_running_average: whether no noise is added, and buffers stay.
        """
        # arguments are indented as nnx.view_info reads them
        if use_running_average is not None:
            self.use_running_average = use_running_average

    @classmethod
    def load(cls, path: str | PathLike[str], *, rngs: Source | None = None) -> Self:
        """The mixture of a checkpoint, whichever backend wrote it.

        Args:
            path: the file.
            rngs: what a router's noise is drawn by, for a module that goes on training.

        Raises:
            CheckpointError: no checkpoint, another kind of layer, or arrays that do not fit.
        """
        return cls.restore(*cls._read(path), rngs=rngs)

    @classmethod
    def restore(cls, config: M, arrays: Mapping[str, Array], *, rngs: Source | None = None) -> Self:
        """A mixture of arrays that exist already; they are used as they are, not copied.

        Args:
            config: the mixture.
            arrays: parameters and buffers by canonical name.
            rngs: what a router's noise is drawn by, for a module that goes on training.

        Raises:
            BackendError, CheckpointError, ShapeError, SpecError: as of other layers.
        """
        cls._check(config, arrays)
        source = None if rngs is None else checked_rngs(rngs)
        return built(cls, MixtureModule, config, arrays, source)

    def _start(self, config: M, init: str, dtype: Any, router_dtype: Any, rngs: Source) -> None:
        source = checked_rngs(rngs)
        arrays = first_values(config, parameters_key(source), init, dtype, router_dtype)
        MixtureModule.__init__(self, config, arrays, source)

    def _saved_arrays(self) -> dict[str, Array]:
        return self.parameters | self.buffers


def _nested(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables as dictionaries of dictionaries, by the parts of their names."""
    parts: dict[str, dict[str, Any]] = {}
    leaves: dict[str, Any] = {}
    for name, variable in variables.items():
        part, dot, rest = name.partition(".")
        if dot:
            parts.setdefault(part, {})[rest] = variable
        else:
            leaves[part] = variable
    return leaves | {name: nnx.Dict(_nested(inner)) for name, inner in parts.items()}
