"""Mixtures whose experts are run one by one, on NumPy: the forward pass, without gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, TypeVar

from tensormoe import functional
from tensormoe._layers import Costs, MixtureMethods
from tensormoe.backend import Array
from tensormoe.mixtures import MixtureConfig, Parts
from tensormoe_numpy._activations import activations
from tensormoe_numpy._base import Held

M = TypeVar("M", bound=MixtureConfig)


class MixtureLayer(Held[M], MixtureMethods[Array, M]):
    """Mixtures with parameters and buffers in dictionaries by canonical name.

    They run, and are saved and loaded, and have no gradients: train them in another framework.
    """

    @classmethod
    def _of_arrays(cls, config: M, arrays: Mapping[str, Array]) -> Self:
        layer = cls.__new__(cls)
        layer._hold(config, arrays)
        return layer

    def _hold(self, config: M, arrays: Mapping[str, Array]) -> None:
        self.config = config
        self.parameters = {name: arrays[name] for name in config.parameter_shapes()}
        self.buffers = {name: arrays[name] for name in config.buffer_shapes()}

    def route(self, x: Array) -> Any:
        """The routing record of tokens (..., in), as outside training.

        Raises:
            BackendError, ShapeError: the input does not fit.
            GateError: logits that no choice follows from: NaN, or -inf alone.
        """
        batch_shape, rows = self._rows(x)
        return self.config.route(self._parts, rows)[0].reshaped(batch_shape, self.backend)

    def __call__(self, x: Array, routes: Any = None) -> Array:
        """Run the mixture: (..., in) → (..., out).

        Args:
            x: (..., in), in the mixture's dtype.
            routes: the record that :meth:`route` returned for these tokens; made anew otherwise.

        Raises:
            BackendError, ShapeError: input or record do not fit.
            GateError: logits that no choice follows from: NaN, or -inf alone.
        """
        batch_shape, rows = self._rows(x)
        if routes is None:
            y, _, _ = self.config.forward(self._parts, rows)
        else:
            self.config.check_routes(routes, batch_shape)
            merged = routes.reshaped(rows.shape[:-1], self.backend)
            y = self.config.run(self._parts, rows, merged)
        return y.reshape(self.config.output_shape(batch_shape))

    @property
    def _parts(self) -> Parts:
        pairs = activations(self.backend)
        acts = lambda name: pairs[name][0]  # noqa: E731
        return Parts.of(self.config, self.arrays, acts, self.backend, reads=True)

    def _rows(self, x: Array) -> tuple[tuple[int, ...], Array]:
        batch_shape = functional.check_input(x, self.config.in_features, self.dtype, self.backend)
        return batch_shape, x.reshape(self.config.merged_shape(batch_shape))

    def _costs(self) -> Costs:
        return {"itemsize": self.dtype.itemsize, "library": self.backend.library}
