"""The inputs with the largest coefficients of every expert; those of several batches merge."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tensormoe.analysis._explorer._examples import Examples, Tokens
from tensormoe.errors import ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# pairs of inputs and experts that are sorted at a time
_PAIRS = 2**18


@dataclass(frozen=True, eq=False)
class TopInputs:
    """The k inputs with the largest coefficients above zero of every expert, largest first.

    Args:
        numbers: (N, k) numbers of the inputs, from 0 for the first; -1 where there are fewer.
        values: (N, k) their coefficients; 0 where there are fewer.
        changed: (N, k, S, C) logits of these inputs with the expert scaled, once for each of the
            exploration's ``scales``; None where no logits are known.
        marks: (N, k, 2w + 1) coefficients of the expert for the tokens around each of these inputs,
            which stand in the middle; 0 beyond a text's ends. None where inputs are not tokens.
    """

    numbers: NDArray[Any]
    values: NDArray[Any]
    changed: NDArray[Any] | None = None
    marks: NDArray[Any] | None = None

    def shifted(self, start: int) -> TopInputs:
        """The same where the first input has the number ``start``."""
        import numpy as np

        return replace(self, numbers=np.where(self.numbers < 0, -1, self.numbers + start))

    def __add__(self, other: TopInputs) -> TopInputs:
        import numpy as np

        if self.values.shape != other.values.shape:
            raise ShapeError(
                "explorations must have the same experts and top to be added; got "
                f"{self.values.shape} and {other.values.shape}."
            )
        values = np.concatenate([self.values, other.values], axis=1)
        # stable: of equal coefficients the earlier input comes first
        order = np.argsort(-values, axis=1, kind="stable")[:, : self.values.shape[1]]

        def taken(one: NDArray[Any] | None, two: NDArray[Any] | None) -> NDArray[Any] | None:
            if one is None or two is None or one.shape != two.shape:
                return None
            both = np.concatenate([one, two], axis=1)
            index = order.reshape(*order.shape, *(1,) * (both.ndim - 2))
            return np.take_along_axis(both, index, axis=1)

        numbers = np.concatenate([self.numbers, other.numbers], axis=1)
        return TopInputs(
            np.take_along_axis(numbers, order, axis=1),
            np.take_along_axis(values, order, axis=1),
            taken(self.changed, other.changed),
            taken(self.marks, other.marks),
        )


def top_inputs(values: NDArray[Any], k: int) -> TopInputs:
    """The k largest coefficients of every expert.

    Args:
        values: (rows, N), none negative.
        k: how many.

    >>> import numpy as np
    >>> found = top_inputs(np.array([[0.5, 0.0], [0.75, 0.0], [0.5, 1.0]]), 2)
    >>> found.numbers.tolist(), found.values.tolist()
    ([[1, 0], [2, -1]], [[0.75, 0.5], [1.0, 0.0]])
    """
    import numpy as np

    rows, experts = values.shape
    found = TopInputs(np.full((experts, k), -1), np.zeros((experts, k)))
    step = max(_PAIRS // max(experts, 1), k)
    for start in range(0, rows, step):
        part = values[start : start + step]
        # an equal coefficient of a later input changes nothing
        places, which = np.nonzero(part > found.values[:, -1])
        if places.size:
            size = part[places, which].astype(np.float64)
            found = found + _by_expert(places + start, which, size, experts, k)
    return found


def _by_expert(
    numbers: NDArray[Any], which: NDArray[Any], values: NDArray[Any], experts: int, k: int
) -> TopInputs:
    import numpy as np

    order = np.lexsort((numbers, -values, which))
    owner = which[order]
    rank = np.arange(order.size) - np.searchsorted(owner, np.arange(experts))[owner]
    order, owner, rank = (each[rank < k] for each in (order, owner, rank))
    made = TopInputs(np.full((experts, k), -1), np.zeros((experts, k)))
    made.numbers[owner, rank], made.values[owner, rank] = numbers[order], values[order]
    return made


def marks_of(
    values: NDArray[Any], texts: NDArray[Any], top: TopInputs, window: int
) -> NDArray[Any]:
    """Coefficients around every top input, within its own text.

    Args:
        values: (rows, N).
        texts: (rows,) the number of each row's text.
        top: of these rows.
        window: tokens on either side.

    Returns:
        (N, k, 2 · window + 1), float32.
    """
    import numpy as np

    experts, k = top.numbers.shape
    made = np.zeros((experts, k, 2 * window + 1), np.float32)
    if not len(values):
        return made
    column = np.arange(experts)[:, None]
    for place, shift in enumerate(range(-window, window + 1)):
        row = np.clip(top.numbers + shift, 0, len(values) - 1)
        inside = (row == top.numbers + shift) & (top.numbers >= 0)
        inside &= texts[row] == texts[np.maximum(top.numbers, 0)]
        made[:, :, place] = np.where(inside, values[row, column], 0.0)
    return made


def with_marks(found: TopInputs, values: NDArray[Any], examples: Examples | None) -> TopInputs:
    """Top inputs with the coefficients around each, where inputs are tokens."""
    if not isinstance(examples, Tokens):
        return found
    import numpy as np

    lengths = [len(each) for each in examples.texts]
    texts = np.repeat(np.arange(len(lengths)), lengths)
    return replace(found, marks=marks_of(values, texts, found, examples.window))
