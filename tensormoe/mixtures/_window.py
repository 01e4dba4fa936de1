"""Windows that a kernel sees: sizes, strides, padding and dilation of a convolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from tensormoe._validation import brief, instance, non_negative_int, positive_int
from tensormoe.backend import Array, Backend, device_of
from tensormoe.errors import ShapeError, SpecError

Sizes = int | Sequence[int]
"""One number for all spatial axes, or one for each."""

Padding = int | str | Sequence[int | Sequence[int]]
"""Zeros on both sides of every axis, of each, or before and behind each; "same" or "valid"."""

_MOST_AXES = 3


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution.

    Args:
        kernel_size: of each spatial axis.
        stride: positions between outputs.
        padding: zeros before and behind each axis.
        dilation: positions between entries of the kernel.

    Raises:
        SpecError: sizes that cannot be, or another number of them.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    def __post_init__(self) -> None:
        axes = len(self.kernel_size)
        for name in ("kernel_size", "stride", "dilation"):
            object.__setattr__(self, name, _sizes(getattr(self, name), axes, name))
        object.__setattr__(self, "padding", _pairs(self.padding, axes))

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel_size)

    @property
    def volume(self) -> int:
        """Entries of the kernel of one channel."""
        return prod(self.kernel_size)

    def out_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Size of the output for images of a size.

        Raises:
            ShapeError: images smaller than the kernel.

        >>> window((3, 3), stride=2, padding=1).out_size((28, 28))
        (14, 14)
        """
        found = []
        for place, pixels in enumerate(size):
            extent = self.dilation[place] * (self.kernel_size[place] - 1) + 1
            before, behind = self.padding[place]
            if pixels + before + behind < extent:
                raise ShapeError(
                    f"images must be as large as the kernel; got {pixels} pixels with "
                    f"{before + behind} of padding for a kernel that spans {extent} (spatial axis "
                    f"{place}). Pad them, or use a smaller kernel."
                )
            found.append((pixels + before + behind - extent) // self.stride[place] + 1)
        return tuple(found)

    def padded(self, x: Array, first: int, backend: Backend) -> Array:
        """Images with zeros around them.

        Args:
            x: images.
            first: their first spatial axis.
            backend: the adapter of their library.
        """
        xp = backend.namespace
        for place, pair in enumerate(self.padding):
            if any(pair):
                axis = first + place
                shapes = [(*x.shape[:axis], count, *x.shape[axis + 1 :]) for count in pair]
                like: Any = {"dtype": x.dtype, "device": device_of(x)}
                before, behind = (xp.zeros(shape, **like) for shape in shapes)
                x = xp.concat([before, x, behind], axis=axis)
        return x

    def shifted(self, x: Array, axis: int, place: int, offset: int, count: int) -> Array:
        """Inputs that one entry of the kernel sees along one axis: a view.

        Args:
            x: padded images.
            axis: of the array.
            place: of the spatial axis.
            offset: of the entry in the kernel.
            count: positions of the output along the axis.
        """
        start = offset * self.dilation[place]
        stride = self.stride[place]
        stop = start + stride * (count - 1) + 1
        return x[(*(slice(None),) * axis, slice(start, stop, stride), ...)]

    def patches(self, x: Array, first: int, channels: int, backend: Backend) -> Array:
        """Patches of images: every channel becomes kernel × channels.

        Args:
            x: images.
            first: their first spatial axis.
            channels: their axis of channels.
            backend: the adapter of their library.
        """
        size = self.out_size(tuple(x.shape[first : first + self.axes]))
        x = self.padded(x, first, backend)
        seen = []
        for offsets in product(*map(range, self.kernel_size)):
            part = x
            for place, offset in enumerate(offsets):
                part = self.shifted(part, first + place, place, offset, size[place])
            seen.append(part)
        return backend.namespace.concat(seen, axis=channels)

    def averages(self, x: Array, first: int, backend: Backend) -> Array:
        """Mean of the pixels that the kernel sees at each position, zeros of the padding included.

        Args:
            x: images.
            first: their first spatial axis.
            backend: the adapter of their library.
        """
        size = self.out_size(tuple(x.shape[first : first + self.axes]))
        x = self.padded(x, first, backend)
        # axis by axis, as the mean over a box is the mean of means
        for place, count in enumerate(size):
            axis, total = first + place, None
            for offset in range(self.kernel_size[place]):
                part = self.shifted(x, axis, place, offset, count)
                total = part if total is None else total + part
            x = total
        return x / self.volume

    def arguments(self) -> str:
        """Arguments of a constructor that give this window."""
        even = all(before == behind for before, behind in self.padding)
        padding = tuple(before for before, _ in self.padding) if even else self.padding
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={padding}, "
            f"dilation={self.dilation}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The window in plain values."""
        return {
            "kernel_size": [*self.kernel_size],
            "stride": [*self.stride],
            "padding": [[*pair] for pair in self.padding],
            "dilation": [*self.dilation],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Window:
        """The inverse of :meth:`to_dict`, for exactly its fields."""
        size = values["kernel_size"]
        instance(size, (list, tuple), "kernel_size", "one number per spatial axis", SpecError)
        axes = _axes(size, 0)
        return cls(
            _sizes(size, axes, "kernel_size"),
            _sizes(values["stride"], axes, "stride"),
            _pairs(values["padding"], axes),
            _sizes(values["dilation"], axes, "dilation"),
        )


def window(
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    dims: int = 2,
) -> Window:
    """A window of the arguments that convolutions have.

    Args:
        kernel_size: one number per spatial axis, or one for all of ``dims`` axes.
        stride: positions between outputs.
        padding: zeros on both sides of every axis; one number per axis, or pairs of numbers before
            and behind; "valid" for none, and "same" for outputs of the images' size, which puts
            the odd one of an even kernel behind.
        dilation: positions between entries of the kernel.
        dims: number of spatial axes, for a kernel size that is one number.

    Raises:
        SpecError: sizes that cannot be, or "same" with strides.

    >>> window(4, padding="same").padding
    ((1, 2), (1, 2))
    """
    axes = _axes(kernel_size, dims)
    kernel = _sizes(kernel_size, axes, "kernel_size")
    strides, dilations = _sizes(stride, axes, "stride"), _sizes(dilation, axes, "dilation")
    if not isinstance(padding, str):
        return Window(kernel, strides, _pairs(padding, axes), dilations)
    if padding not in ("same", "valid"):
        raise SpecError(
            f'padding must be numbers, "same" or "valid"; got {padding!r}. Write one of them.'
        )
    if padding == "valid":
        return Window(kernel, strides, ((0, 0),) * axes, dilations)
    if any(each != 1 for each in strides):
        raise SpecError(
            f'padding must be numbers for strides above 1; got "same" with stride {strides}, which '
            "libraries pad in different ways. Write the zeros on both sides."
        )
    totals = [apart * (entries - 1) for apart, entries in zip(dilations, kernel, strict=True)]
    return Window(
        kernel, strides, tuple((total // 2, total - total // 2) for total in totals), dilations
    )


def _axes(kernel_size: object, dims: object) -> int:
    listed = isinstance(kernel_size, Sequence) and not isinstance(kernel_size, str)
    axes = len(kernel_size) if listed else positive_int(dims, "dims")  # type: ignore[arg-type]
    if not 1 <= axes <= _MOST_AXES:
        raise SpecError(
            f"images must have from 1 to {_MOST_AXES} spatial axes; got {axes}. Give kernel_size "
            "one number per axis, or dims for one number."
        )
    return axes


def _sizes(value: Any, axes: int, name: str) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (positive_int(value, name),) * axes
    if len(value) != axes:
        raise SpecError(
            f"{name} must be one number, or one per spatial axis, {axes}; got {brief(value)}."
        )
    return tuple(positive_int(each, name) for each in value)


def _pairs(value: Any, axes: int) -> tuple[tuple[int, int], ...]:
    if not isinstance(value, Sequence):
        each = non_negative_int(value, "padding")
        return ((each, each),) * axes
    if isinstance(value, str) or len(value) != axes:
        raise SpecError(
            f"padding must be one number, or one or two per spatial axis, {axes}; got "
            f"{brief(value)}."
        )
    found = []
    for each in value:
        pair = each if isinstance(each, Sequence) else (each, each)
        if isinstance(each, str) or len(pair) != 2:
            raise SpecError(
                f"padding must be one number, or one or two per spatial axis; got {brief(each)} "
                "for one."
            )
        found.append((non_negative_int(pair[0], "padding"), non_negative_int(pair[1], "padding")))
    return tuple(found)
