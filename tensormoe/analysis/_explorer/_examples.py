"""Inputs as people see them: images, texts, tokens of texts, and rows of tables."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias

from tensormoe._validation import brief, is_number, positive_int
from tensormoe.analysis._explorer._png import data_uri, thumbnail
from tensormoe.analysis._inputs import host_numbers
from tensormoe.errors import ShapeError, SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LONGEST_TEXT, LONGEST_CELL = 2000, 200


@dataclass(frozen=True, eq=False)
class Images:
    """Inputs as images.

    Args:
        pixels: (rows, height, width), or (rows, height, width, channels) with 1, 3 or 4 channels,
            of any library.
        low: value of black; 0 by default.
        high: value of white; 255 for integers and 1 for floats by default.
        size: pixels that the longer side may have; larger images are averaged down.

    Raises:
        ShapeError: arrays that are not images.
        SpecError: values outside [low, high].

    >>> import numpy as np
    >>> Images(np.zeros((5, 8, 8))).count
    5
    """

    pixels: Any
    low: float = 0.0
    high: float | None = None
    size: int = 64

    def __post_init__(self) -> None:
        shape = tuple(getattr(self.pixels, "shape", ()))
        if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3, 4)):
            raise ShapeError(
                "pixels must have shape (rows, height, width) or (rows, height, width, channels) "
                f"with 1, 3 or 4 channels; got {shape}. Move the channels to the end."
            )
        if 0 in shape[1:]:
            raise ShapeError(f"pixels must be images of at least one pixel; got shape {shape}.")
        positive_int(self.size, "size")
        import numpy as np

        values = host_numbers(self.pixels)
        ends = self.low, self._high(values)
        if not all(is_number(end) for end in ends) or not ends[0] < ends[1]:
            raise SpecError(f"low must be below high; got {ends[0]!r} and {ends[1]!r}.")
        if values.size and not (values.min() >= ends[0] and values.max() <= ends[1]):
            raise SpecError(
                f"pixels must lie in [{ends[0]:g}, {ends[1]:g}]; got values from "
                f"{np.min(values):g} to {np.max(values):g}. Pass low and high."
            )

    def _high(self, values: NDArray[Any]) -> float:
        if self.high is not None:
            return self.high
        return 255.0 if values.dtype.kind in "iu" else 1.0

    @property
    def count(self) -> int:
        """Number of inputs."""
        return int(self.pixels.shape[0])

    def content(self, row: int) -> dict[str, Any]:
        """One input as JSON holds it."""
        import numpy as np

        values = host_numbers(self.pixels[row])
        high = self._high(values)
        grey = (values.astype(np.float64) - self.low) * (255.0 / (high - self.low))
        pixels = grey.round().clip(0, 255).astype(np.uint8)
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        return {"image": data_uri(thumbnail(pixels, self.size))}


@dataclass(frozen=True)
class Texts:
    """Inputs as whole texts; long ones are cut off behind 2,000 characters.

    Args:
        texts: one per input.

    Raises:
        ShapeError: anything but strings.
    """

    texts: Sequence[str]

    def __post_init__(self) -> None:
        _check_strings(self.texts, "texts")

    @property
    def count(self) -> int:
        """Number of inputs."""
        return len(self.texts)

    def content(self, row: int) -> dict[str, Any]:
        """One input as JSON holds it."""
        return {"text": cut(self.texts[row], LONGEST_TEXT)}


@dataclass(frozen=True)
class Tokens:
    """Inputs as tokens of texts: an expert's page highlights the tokens around each of them.

    Args:
        texts: each a list of tokens. Inputs are all of them, text after text.
        window: tokens shown on either side of an input.

    Raises:
        ShapeError: anything but lists of strings.

    >>> Tokens([["a", " b"], ["c"]]).content(1)
    {'tokens': ['a', ' b'], 'first': -1}
    """

    texts: Sequence[Sequence[str]]
    window: int = 12

    def __post_init__(self) -> None:
        positive_int(self.window, "window")
        if isinstance(self.texts, str) or not isinstance(self.texts, Sequence):
            raise ShapeError(
                f"texts must be a list of lists of tokens; got {brief(self.texts)}. Pass [tokens]."
            )
        for place, text in enumerate(self.texts):
            _check_strings(text, f"texts[{place}]")

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(accumulate(map(len, self.texts)))

    @property
    def count(self) -> int:
        """Number of inputs: of all tokens."""
        return self._ends[-1] if self._ends else 0

    def place(self, row: int) -> tuple[int, int]:
        """The number of an input's text, and its place in it."""
        text = bisect_right(self._ends, row)
        return text, row - (self._ends[text - 1] if text else 0)

    def content(self, row: int) -> dict[str, Any]:
        """One input as JSON holds it: its window, and how far before it that starts."""
        text, at = self.place(row)
        first = max(at - self.window, 0)
        shown = self.texts[text][first : at + self.window + 1]
        return {"tokens": [cut(each, LONGEST_CELL) for each in shown], "first": first - at}


@dataclass(frozen=True, eq=False)
class Table:
    """Inputs as rows of a table.

    Args:
        rows: one per input, as many cells as there are columns: numbers or strings.
        columns: their names.

    Raises:
        ShapeError: rows of another length.

    >>> Table([[5.25, "red"]], ["width", "colour"]).content(0)
    {'cells': ['5.25', 'red']}
    """

    rows: Any
    columns: Sequence[str]

    def __post_init__(self) -> None:
        _check_strings(self.columns, "columns")
        if isinstance(self.rows, str) or not (
            isinstance(self.rows, Sequence) or len(getattr(self.rows, "shape", ())) == 2
        ):
            raise ShapeError(
                f"rows must be a list of rows, or have two axes; got {brief(self.rows)}."
            )
        for place, row in enumerate(self.rows):
            if isinstance(row, str) or not hasattr(row, "__len__") or len(row) != len(self.columns):
                raise ShapeError(
                    f"rows must have one cell per column, {len(self.columns)}; got {brief(row)} at "
                    f"position {place}."
                )

    @property
    def count(self) -> int:
        """Number of inputs."""
        return len(self.rows)

    def content(self, row: int) -> dict[str, Any]:
        """One input as JSON holds it."""
        return {"cells": [_cell(each) for each in self.rows[row]]}


Examples: TypeAlias = Images | Texts | Tokens | Table


def cut(text: str, most: int) -> str:
    """A text of at most so many characters; a cut is marked."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return cut(value, LONGEST_CELL)
    try:
        return f"{float(value):.6g}"
    except (TypeError, ValueError):
        return cut(str(value), LONGEST_CELL)


def _check_strings(values: Any, name: str) -> None:
    listed = not isinstance(values, str) and isinstance(values, Sequence)
    if not listed:
        raise ShapeError(f"{name} must be a list of strings; got {brief(values)}.")
    for place, value in enumerate(values):
        if not isinstance(value, str):
            raise ShapeError(f"{name} must be strings; got {brief(value)} at position {place}.")
