"""Factorized mixture of convolutions: its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from types import NoneType
from typing import Any, ClassVar

from tensormoe._config import LayerConfig
from tensormoe._mixture import MixtureConfig, OwnArray, checked_fields
from tensormoe._spec import LayerSpec
from tensormoe._validation import brief, choice, instance, positive_int
from tensormoe.backend import Array, Backend, Convolves
from tensormoe.errors import ShapeError, SpecError
from tensormoe.factorizations import Dense
from tensormoe.functional import initial_span
from tensormoe.functional import route as route_rows
from tensormoe.gates import Across, Gate
from tensormoe.mixtures._conv_cost import ConvPlan, conv_cost
from tensormoe.mixtures._conv_run import convolve, gate_inputs
from tensormoe.mixtures._parts import Parts
from tensormoe.mixtures._window import Window
from tensormoe.planning import Cost, Library
from tensormoe.planning._convolved import Convolved, ConvPrograms, conv_programs
from tensormoe.planning._library import DEFAULT, Convolutions

Routed = tuple[tuple[Array, ...], tuple[Array, ...]]
"""Coefficients and logits, one array (rows, N_e) per level."""

PER = ("image", "position")
"""Values of ``experts_per``."""


@dataclass(frozen=True)
class ConvConfig(MixtureConfig):
    """A factorized mixture of convolutions without its arrays.

    𝒲 has the shape (experts…, kernel · in, out): the input mode of the experts is a patch, kernel
    offsets first, channels last.

    Args:
        experts: the experts as a layer without a gate, whose inputs are patches.
        gate: how channels become coefficients; None for a layer that is always given them.
        window: geometry of the convolution.
        experts_per: "image" for one set of coefficients per image, from the mean of its pixels;
            "position" for one per position of the output, from the mean of its patch.

    Attributes:
        gate_config: the gate as that of a layer over the channels; None without a gate.

    Raises:
        SpecError: parts that do not fit.
    """

    experts: LayerConfig
    gate: Gate | None
    window: Window
    experts_per: str
    # no cached property, which locks on first use: compilers cannot follow that
    gate_config: LayerConfig | None = field(init=False, repr=False, compare=False)

    block: ClassVar[str] = "ConvMoE"

    def __post_init__(self) -> None:
        instance(self.experts, LayerConfig, "experts", "a LayerConfig", SpecError)
        instance(self.gate, (Gate, NoneType), "gate", "a Gate or None", SpecError)
        instance(self.window, Window, "window", "a Window", SpecError)
        choice(self.experts_per, PER, "experts_per", SpecError)
        layer, volume = self.experts, self.window.volume
        if layer.gate is not None or layer.indexed_input or layer.spec.in_features % volume:
            raise SpecError(
                f"experts must be a layer without a gate over patches of {volume} pixels; got "
                f"{layer.spec.in_features} features, gate {layer.gate!r} and indexed_input="
                f"{layer.indexed_input}. Give it in_features = {volume} · in_channels."
            )
        spec = layer.spec
        gated = LayerSpec(self.in_channels, spec.out_features, spec.experts, Dense())
        made = None if self.gate is None else LayerConfig(gated, self.gate)
        object.__setattr__(self, "gate_config", made)

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.experts.spec.in_features // self.window.volume

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.experts.spec.out_features

    @property
    def in_features(self) -> int:
        """Channels of an image."""
        return self.in_channels

    @property
    def out_features(self) -> int:
        """Channels of the output."""
        return self.out_channels

    @property
    def per_image(self) -> bool:
        """Whether an image has one set of coefficients."""
        return self.experts_per == "image"

    @cached_property
    def layers(self) -> Mapping[str, LayerConfig]:
        return {"experts": self.experts}

    @cached_property
    def own(self) -> Mapping[str, OwnArray]:
        if self.gate_config is None:
            return {}
        shapes = self.gate_config.parameter_shapes()
        arrays = {}
        for name, shape in shapes.items():
            if name.startswith("gate."):
                span = initial_span(self.gate_config, name)
                arrays[name] = OwnArray(shape, "uniform", span) if span else OwnArray(shape)
        return arrays

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        return {} if self.gate_config is None else self.gate_config.buffer_shapes()

    def programs(
        self, convolves: Convolutions = "", *, channels_first: bool = False
    ) -> ConvPrograms:
        """The programs of the layer, planned on first use.

        Args:
            convolves: the convolutions that there are, as
                :attr:`tensormoe.planning.Library.convolves`.
            channels_first: whether channels come before the spatial axes.
        """
        form = Convolved(convolves, self.per_image, self.per_image and channels_first)
        return conv_programs(self.experts.spec.network, form)

    def plan(
        self,
        size: Sequence[int],
        images: int = 1,
        *,
        library: Library = DEFAULT,
        channels_first: bool = False,
    ) -> ConvPlan:
        """Plan of images of one size.

        Args:
            size: of an image, without channels.
            images: how many.
            library: how the array library runs a layer; one without convolutions by default.
            channels_first: whether its channels come before the spatial axes.

        Raises:
            ShapeError: another number of axes, or images smaller than the kernel.
            SpecError: not sizes.

        >>> from tensormoe.mixtures import conv_config
        >>> from tensormoe.planning import Library
        >>> config = conv_config(16, 32, 3, experts=8, rank=12, padding=1)
        >>> [config.plan((28, 28), library=Library(convolves=each)).way for each in ("", "shared")]
        ['patches', 'convolution']
        """
        positions = prod(self.window.out_size(self.checked_size(size)))
        count = positive_int(images, "images")
        programs = self.programs(library.convolves, channels_first=channels_first)
        program = programs.program(count, positions)
        return ConvPlan(self, tuple(size), count, program, programs.bias)

    def checked_size(self, size: object) -> tuple[int, ...]:
        """The size of an image without channels.

        Raises:
            SpecError: not one positive integer per spatial axis.
        """
        axes = self.window.axes
        if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != axes:
            raise SpecError(
                f"size must be that of an image without channels, {axes} numbers; got "
                f"{brief(size)}. Write size=(28, 28), for instance."
            )
        return tuple(positive_int(each, "size") for each in size)

    def noise_shape(self, *tokens: int) -> tuple[int, ...] | None:
        noisy = self.gate is not None and self.gate.noise > 0
        return (*tokens, sum(self.experts.spec.experts)) if noisy else None

    def route(
        self,
        parts: Parts,
        x: Array,
        *,
        training: bool = False,
        noise: Array | None = None,
        across: Across | None = None,
    ) -> tuple[Routed, dict[str, Array]]:
        """Coefficients and logits of rows of channels, and the buffers that training changed.

        Args:
            parts: arrays and buffers of the mixture.
            x: (rows, channels), as :meth:`gate_inputs` makes them.
            training: whether batch norm uses the batch's own statistics, noise is added, and
                buffers move.
            noise: standard normal (rows, ΣN_e), in training with noise.
            across: as for :func:`tensormoe.gates.activate`.

        Raises:
            GateError: noise or buffers that are needed and not given.
            ShapeError: there is no gate.
        """
        config = self.checked_gate()
        noises = None
        if noise is not None:
            ends = [sum(config.spec.experts[: level + 1]) for level in range(config.spec.levels)]
            starts = [0, *ends[:-1]]
            noises = [noise[:, a:b] for a, b in zip(starts, ends, strict=True)]
        routed = route_rows(
            config,
            parts.arrays,
            x,
            parts.backend,
            buffers={name: parts.arrays[name] for name in self.buffer_shapes()},
            keep=True,
            training=training,
            across=across,
            noise=noises,
        )
        return (tuple(routed.coefficients), tuple(routed.logits)), routed.buffers

    def checked_gate(self) -> LayerConfig:
        """The gate's configuration.

        Raises:
            ShapeError: there is none, and so no coefficients.
        """
        if self.gate_config is None:
            raise ShapeError(
                "this layer has no gate; got no coefficients. Call it with coefficients=…, or "
                "build it with a gate."
            )
        return self.gate_config

    def gate_inputs(self, x: Array, backend: Backend) -> Array:
        """Means of pixels (rows, channels), a row per image or per position, in the images' dtype.

        Args:
            x: images, in the backend's layout.
            backend: the adapter of their library.
        """
        return gate_inputs(self.window, self.per_image, x, backend)

    def run(self, parts: Parts, x: Array, routes: Sequence[Array]) -> Array:
        """Outputs of images.

        Args:
            parts: arrays of the mixture.
            x: images, in the backend's layout.
            routes: coefficients (rows, N_e) per level.
        """
        factors = {
            name.partition(".")[2]: array
            for name, array in parts.arrays.items()
            if name.startswith("experts.")
        }
        backend = parts.backend
        programs = self.programs()
        if isinstance(backend, Convolves):
            programs = self.programs(backend.convolves, channels_first=backend.channels_first)
        return convolve(self.window, programs, factors, x, routes, backend)

    def check_routes(self, routes: Any, batch_shape: tuple[int, ...]) -> None:
        wanted = [(*batch_shape, count) for count in self.experts.spec.experts]
        found = [tuple(each.shape) for each in routes]
        if found != wanted:
            raise ShapeError(f"coefficients must have shapes {wanted}; got {found}.")

    def cost(
        self,
        batch: int,
        *,
        itemsize: int = 4,
        library: Library = DEFAULT,
        training: bool = False,
        size: Sequence[int] | None = None,
    ) -> Cost:
        """Cost of one call for ``batch`` images, the gate included.

        Args:
            batch: number of images, all leading axes multiplied.
            itemsize: bytes per entry: 4 for float32.
            library: how the array library runs a layer.
            training: forward and backward with all gradients, instead of forward alone.
            size: of an image, without channels; must be given.

        Raises:
            PlanError, SpecError, ShapeError: sizes that cannot be.
        """
        return conv_cost(
            self,
            batch,
            self.checked_size(size),
            itemsize=itemsize,
            library=library,
            training=training,
        )

    def arguments(self) -> str:
        spec = self.experts.spec
        experts = spec.experts[0] if spec.levels == 1 else spec.experts
        return (
            f"{self.in_channels}, {self.out_channels}, {self.window.arguments()}, "
            f"experts={experts}, experts_per={self.experts_per!r}, "
            f"factorization={spec.factorization!r}, bias={spec.bias}, gate={self.gate!r}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "experts": self.experts.to_dict(),
            "gate": None if self.gate is None else self.gate.to_dict(),
            "window": self.window.to_dict(),
            "experts_per": self.experts_per,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConvConfig:
        found = checked_fields(values, {"experts", "gate", "window", "experts_per"}, "convolution")
        fields = {"kernel_size", "stride", "padding", "dilation"}
        geometry = checked_fields(found["window"], fields, "window")
        return cls(
            LayerConfig.from_dict(found["experts"]),
            None if found["gate"] is None else Gate.from_dict(found["gate"]),
            Window.from_dict(geometry),
            found["experts_per"],
        )
