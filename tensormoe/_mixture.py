"""Mixtures without their arrays: layers by name, and arrays of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from tensormoe._config import LayerConfig
from tensormoe._validation import brief
from tensormoe.errors import SpecError
from tensormoe.planning import Cost, Library
from tensormoe.planning._library import DEFAULT

if TYPE_CHECKING:
    from tensormoe.backend import Array
    from tensormoe.gates import Across
    from tensormoe.mixtures import Parts


@dataclass(frozen=True)
class OwnArray:
    """Trainable array of a mixture that is not a factor of a layer.

    Args:
        shape: of the array.
        start: distribution of its initial values.
        size: half the width of a uniform distribution, or the standard deviation of a normal one.
    """

    shape: tuple[int, ...]
    start: Literal["zeros", "ones", "uniform", "normal"] = "zeros"
    size: float = 1.0


class MixtureConfig(ABC):
    """A mixture without its arrays; its parts are layers without gates, and arrays of its own.

    Names of parts have dots: an array of the layer ``experts.projections.down_proj`` is
    ``experts.projections.down_proj.factors.weight``. Arrays of a part ``router`` may be in
    float32 beside factors of 16 bits.
    """

    block: ClassVar[str]
    """Name of the class of its layers, the same in every framework and in checkpoints."""

    mixes_tokens: ClassVar[bool] = False
    """Whether the output of a token depends on the other tokens of its set."""

    @property
    @abstractmethod
    def in_features(self) -> int:
        """Size of a token."""

    @property
    @abstractmethod
    def out_features(self) -> int:
        """Size of an output."""

    @cached_property
    @abstractmethod
    def layers(self) -> Mapping[str, LayerConfig]:
        """The layers by name."""

    @cached_property
    @abstractmethod
    def own(self) -> Mapping[str, OwnArray]:
        """The other trainable arrays by canonical name."""

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array that is kept but not trained."""
        return {}

    def merged_shape(self, batch_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape that an input (*batch_shape, in) runs in: (tokens, in), or (sets, tokens, in).

        >>> from tensormoe.mixtures import sparse_config
        >>> sparse_config(16, 32, None, experts=4, top_k=2).merged_shape((3, 5))
        (15, 16)
        """
        if not self.mixes_tokens:
            return prod(batch_shape), self.in_features
        return prod(batch_shape[:-1]), batch_shape[-1], self.in_features

    def output_shape(self, batch_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the output for an input (*batch_shape, in)."""
        return (*batch_shape, self.out_features)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every trainable array by canonical name."""
        shapes = {
            f"{name}.{array}": shape
            for name, layer in self.layers.items()
            for array, shape in layer.parameter_shapes().items()
        }
        return shapes | {name: array.shape for name, array in self.own.items()}

    @property
    def num_parameters(self) -> int:
        """Trainable entries, the router's included."""
        return sum(map(prod, self.parameter_shapes().values()))

    def plan_ahead(self) -> None:
        """Plan all layers now, as :meth:`LayerConfig.plan_ahead`."""
        for layer in self.layers.values():
            layer.plan_ahead()

    def noise_shape(self, *tokens: int) -> tuple[int, ...] | None:
        """Shape of the standard normal noise that routing takes in training; None for none.

        Args:
            tokens: the axes of tokens: (tokens,), or (sets, tokens) if :attr:`mixes_tokens`.
        """
        return None

    @abstractmethod
    def route(
        self,
        parts: Parts,
        x: Array,
        *,
        training: bool = False,
        noise: Array | None = None,
        across: Across | None = None,
    ) -> tuple[Any, dict[str, Array]]:
        """The routing record of tokens, and the buffers that training changed.

        Args:
            parts: arrays and buffers of the mixture.
            x: (tokens, in), or (sets, tokens, in) if :attr:`mixes_tokens`.
            training: whether noise is added, and buffers move.
            noise: standard normal, of :meth:`noise_shape`, in training.
            across: where others have further tokens of the step, the sum of an array over all of
                them.

        Raises:
            GateError: noise or buffers that are needed and not given.
        """

    @abstractmethod
    def run(self, parts: Parts, x: Array, routes: Any) -> Array:
        """Outputs of tokens that are routed already.

        Args:
            parts: runs the layers.
            x: (tokens, in), or (sets, tokens, in) if :attr:`mixes_tokens`.
            routes: what :meth:`route` returned for them.
        """

    def forward(
        self,
        parts: Parts,
        x: Array,
        *,
        training: bool = False,
        noise: Array | None = None,
        across: Across | None = None,
    ) -> tuple[Array, Any, dict[str, Array]]:
        """Outputs of tokens, their routing record, and the buffers that training changed.

        Arguments and errors are those of :meth:`route`.
        """
        routes, changed = self.route(parts, x, training=training, noise=noise, across=across)
        return self.run(parts, x, routes), routes, changed

    @abstractmethod
    def check_routes(self, routes: Any, batch_shape: tuple[int, ...]) -> None:
        """Refuse the routing record of other tokens or of another layer.

        Raises:
            ShapeError: arrays of other shapes.
        """

    @abstractmethod
    def cost(
        self,
        batch: int,
        *,
        itemsize: int = 4,
        library: Library = DEFAULT,
        training: bool = False,
    ) -> Cost:
        """Cost of one call for ``batch`` tokens, the router included.

        Args:
            batch: number of tokens, all leading axes multiplied.
            itemsize: bytes per entry: 4 for float32.
            library: how the array library runs a layer.
            training: forward and backward with all gradients, instead of forward alone.
        """

    @abstractmethod
    def arguments(self) -> str:
        """Arguments of the constructor that give this configuration, for ``repr``."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The configuration in plain values, as checkpoints store it."""

    @classmethod
    @abstractmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`; strict about names.

        Raises:
            SpecError: a value is missing, unknown or cannot be.
        """


def checked_fields(values: object, expected: set[str], kind: str) -> Mapping[str, Any]:
    """Values of a description that must have exactly these fields.

    Raises:
        SpecError: it has others.
    """
    if not isinstance(values, Mapping) or {*values} != expected:
        raise SpecError(
            f"a {kind}'s config must have exactly {sorted(expected)}; got {brief(values)}."
        )
    return values
