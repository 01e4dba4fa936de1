"""Factorized convolutions at work: what a gate sees of images, and outputs of given coefficients.

Images are in the layout of the backend: (images, channels, *size) where its convolutions have
channels first, and (images, *size, channels) elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from tensormoe.backend import Array, Backend, Convolves
from tensormoe.errors import ShapeError
from tensormoe.execution import execute
from tensormoe.factorizations import INPUT, OUTPUT
from tensormoe.functional._dtypes import cast, widened
from tensormoe.mixtures._window import Window
from tensormoe.planning._convolved import ANY, ConvPrograms, way_of
from tensormoe.planning._program import Operand, Program


def spatial(backend: Backend) -> tuple[int, int]:
    """The first spatial axis of images, and their axis of channels."""
    return (2, 1) if isinstance(backend, Convolves) and backend.channels_first else (1, -1)


def check_images(
    x: Array, window: Window, channels: int, *, channels_first: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The leading shape of images, and their size.

    Args:
        x: images.
        window: geometry of the layer.
        channels: of an image.
        channels_first: whether channels come before the spatial axes.

    Raises:
        ShapeError: another layout, other channels, or images smaller than the kernel.
    """
    shape, axes = tuple(x.shape), window.axes
    place = -axes - 1 if channels_first else -1
    if len(shape) <= axes or shape[place] != channels:
        names = ["height", "width"] if axes == 2 else ["length"] if axes == 1 else ["size"] * axes
        order = [str(channels), *names] if channels_first else [*names, str(channels)]
        raise ShapeError(
            f"images must have shape (..., {', '.join(order)}); got {shape}. Check the layer's "
            "in_channels, or move the axis of channels."
        )
    start = len(shape) - axes - (0 if channels_first else 1)
    size = shape[start : start + axes]
    window.out_size(size)
    return shape[: start - channels_first], size


def check_coefficients(
    given: Any, experts: tuple[int, ...], shape: tuple[int, ...], backend: Backend
) -> list[Array]:
    """Ready-made coefficients as rows (rows, N_e), one array per level.

    Args:
        given: an array (*shape, N_e), or one per level.
        experts: one size per level.
        shape: leading shape of the images, and behind it the positions of the output where each has
            its own coefficients.
        backend: the adapter of the layer's library.

    Raises:
        ShapeError: another number of levels, other shapes, or coefficients by index.
    """
    listed = [*given] if isinstance(given, list | tuple) else [given]
    if len(listed) != len(experts):
        raise ShapeError(
            f"coefficients must have one array per level, {len(experts)}; got {len(listed)}."
        )
    rows = []
    for level, (array, count) in enumerate(zip(listed, experts, strict=True)):
        if not backend.owns(array) or tuple(array.shape) != (*shape, count):
            found = tuple(array.shape) if backend.owns(array) else type(array).__name__
            raise ShapeError(
                f"coefficients of level {level} must be an array of shape {(*shape, count)}; got "
                f"{found}. A convolution takes dense ones, zeros included."
            )
        rows.append(backend.reshape(array, (prod(shape), count)))
    return rows


def gate_inputs(window: Window, per_image: bool, x: Array, backend: Backend) -> Array:
    """Means of pixels (rows, channels), a row per image or per position, in the images' dtype."""
    first, channels = spatial(backend)
    wide = widened(x, backend)
    if per_image:
        axes = tuple(range(first, first + window.axes))
        pixels = prod(x.shape[first : first + window.axes])
        return cast(backend.sum(wide, axes) / pixels, x.dtype, backend)
    means = cast(window.averages(wide, first, backend), x.dtype, backend)
    if channels == 1:
        means = backend.permute(means, (0, *range(2, means.ndim), 1))
    return backend.reshape(means, (prod(means.shape[:-1]), means.shape[-1]))


def expert_kernel(
    window: Window, matrix: Array, bias: Array | None, backend: Backend, *, channels_first: bool
) -> tuple[Array, Array | None]:
    """Kernels of matrices (..., in, out) in the layout of a framework, and biases as they are.

    Args:
        window: geometry of the convolution.
        matrix: of experts.
        bias: of experts, or None.
        backend: the adapter of their library.
        channels_first: whether kernels are (..., out, in, *size), instead of (..., *size, in, out).
    """
    *lead, features, count = matrix.shape
    shape = (*lead, *window.kernel_size, features // window.volume, count)
    kernel = backend.reshape(matrix, shape)
    if channels_first:
        start = len(lead)
        size = range(start, start + window.axes)
        kernel = backend.permute(kernel, (*range(start), kernel.ndim - 1, kernel.ndim - 2, *size))
    return kernel, bias


def convolve(
    window: Window,
    programs: ConvPrograms,
    factors: Mapping[str, Array],
    x: Array,
    coefficients: Sequence[Array],
    backend: Backend,
    *,
    any_size: bool = False,
) -> Array:
    """Outputs of images for given coefficients.

    Args:
        window: geometry of the convolution.
        programs: what is run.
        factors: of the experts by canonical name, ``factors.…``, in one dtype.
        x: images in that dtype, in the backend's layout.
        coefficients: (rows, N_e) per level; a row per image, or per position in row-major order.
        backend: the adapter of the arrays' library.
        any_size: whether to run the program for many large images, which is right for all: for
            exported models, whose sizes are open.
    """
    first, channels = spatial(backend)
    size = window.out_size(tuple(x.shape[first : first + window.axes]))
    images, positions = x.shape[0], prod(size)
    program = programs.program(images, positions, any_size=any_size)
    rows = [cast(each, x.dtype, backend) for each in coefficients]
    call = _Call(window, programs, factors, x, rows, backend, (images, positions))
    way = way_of(program)
    arrays = [call.operand(program, each) for each in program.operands]
    made = execute(program, arrays, _OfSize(backend, positions))[0][0]
    if way == "kernels":
        return call.with_kernels(program, made)
    count = program.sizes[OUTPUT]
    if channels == 1 and programs.form.per_image:
        return backend.reshape(made, (images, count, *size))
    made = backend.reshape(made, (images, *size, count))
    return (
        backend.permute(made, (0, made.ndim - 1, *range(1, made.ndim - 1)))
        if channels == 1
        else made
    )


class _OfSize:
    """A backend that runs programs for images of any size on those of one size."""

    def __init__(self, backend: Backend, positions: int) -> None:
        self._backend = backend
        self._positions = positions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def reshape(self, array: Array, shape: tuple[int, ...], /) -> Array:
        sized = tuple(
            number // ANY * self._positions if number > 0 and number % ANY == 0 else number
            for number in shape
        )
        return self._backend.reshape(array, sized)


class _Call:
    """Operands of one call.

    Args:
        window: geometry of the convolution.
        programs: what is run.
        factors: by canonical name.
        x: images.
        coefficients: (rows, N_e) per level.
        backend: the adapter of the arrays' library.
        counts: images, and positions of each.
    """

    def __init__(
        self,
        window: Window,
        programs: ConvPrograms,
        factors: Mapping[str, Array],
        x: Array,
        coefficients: Sequence[Array],
        backend: Backend,
        counts: tuple[int, int],
    ) -> None:
        self.window = window
        self.programs = programs
        self.factors = factors
        self.x = x
        self.coefficients = coefficients
        self.backend = backend
        self.counts = counts

    def operand(self, program: Program, operand: Operand) -> Array:
        """An operand of a program."""
        if operand.role == "factor":
            return self.factors[f"factors.{operand.name}"]
        kind, _, number = operand.name.rpartition("_")
        if kind == "coefficients":
            return self.coefficients[int(number)]
        if kind == "convolved":
            return self._convolved(program, int(number), operand)
        first, channels = spatial(self.backend)
        patches = self.window.patches(self.x, first, channels, self.backend)
        return self._rows(patches, (program.sizes[INPUT],))

    def with_kernels(self, program: Program, kernels: Array) -> Array:
        """Outputs of images with a kernel (in, out) each."""
        bias = None
        if self.programs.bias is not None:
            arrays = [
                self.operand(self.programs.bias, each) for each in self.programs.bias.operands
            ]
            bias = execute(self.programs.bias, arrays, self.backend)[0][0]
        shape = (self.counts[0], *self._kernel(program.sizes[INPUT]), program.sizes[OUTPUT])
        return self._convolve(self.backend.reshape(kernels, shape), bias)

    def _convolved(self, program: Program, number: int, operand: Operand) -> Array:
        """The convolution of the images with the input's factor of one term."""
        term = self.programs.terms[number]
        factor = term.input_factor
        kernel, place = self.factors[f"factors.{factor.name}"], factor.legs.index(INPUT)
        if place:
            axes = (place, *(axis for axis in range(kernel.ndim) if axis != place))
            kernel = self.backend.permute(kernel, axes)
        bonds = tuple(kernel.shape[1:])
        shape = (*self._kernel(kernel.shape[0]), prod(bonds))
        bias = None
        if term.bias is not None:
            bias = self.factors[f"factors.{term.bias.name}"]
            order = [term.bias.legs.index(leg) for leg in factor.legs if leg != INPUT]
            bias = self.backend.reshape(self.backend.permute(bias, tuple(order)), (prod(bonds),))
        return self._rows(self._convolve(self.backend.reshape(kernel, shape), bias), bonds)

    def _convolve(self, kernels: Array, bias: Array | None) -> Array:
        assert isinstance(self.backend, Convolves)
        opening = self.window
        return self.backend.convolve(
            self.x, kernels, bias, opening.stride, opening.padding, opening.dilation
        )

    def _kernel(self, features: int) -> tuple[int, ...]:
        return (*self.window.kernel_size, features // self.window.volume)

    def _rows(self, images: Array, features: tuple[int, ...]) -> Array:
        """Features at each position, in the order that the program takes them in."""
        count, positions = self.counts
        first = spatial(self.backend)[1] == 1
        if self.programs.form.per_image:
            shape = (*features, positions) if first else (positions, *features)
            return self.backend.reshape(images, (count, *shape))
        if first:
            images = self.backend.permute(images, (0, *range(2, images.ndim), 1))
        return self.backend.reshape(images, (count * positions, *features))
