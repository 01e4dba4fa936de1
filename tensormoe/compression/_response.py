"""Response of a model's loss to errors of a projection: measured increases by predicted ones.

Half of a second derivative holds for small errors, each by itself. Larger ones, and those of early
layers, which are inputs of all later ones, do more. How much more is measured at a few sizes.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from math import exp, log
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Response:
    """Increase of a loss by one projection, as a function of the predicted one.

    Between two measured points, logarithms are joined by straight lines. Beyond the largest, the
    ratio stays what it is there; below the smallest, it falls as it does between the first two,
    until the increase is the predicted one, which is the limit for small errors.

    The increase is never below the predicted one, nor below that of a smaller error: measured
    increases of small errors are differences of two losses, and noise may make them anything.

    Args:
        points: predicted and measured increases in nats per token, by rising predicted ones; none
            leave predictions as they are.

    >>> response = Response(((0.1, 0.2), (0.4, 1.6)))
    >>> [round(response(each), 3) for each in (0.01, 0.1, 0.2, 0.4, 0.8)]
    [0.01, 0.2, 0.566, 1.6, 3.2]
    """

    points: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        kept: list[tuple[float, float]] = []
        for predicted, measured in sorted(self.points):
            # directions without any weight tell nothing
            if predicted <= 0.0 or (kept and predicted == kept[-1][0]):
                continue
            least = kept[-1][1] if kept else 0.0
            kept.append((predicted, max(measured, predicted, least)))
        object.__setattr__(self, "points", tuple(kept))

    @classmethod
    def of(cls, arrays: list[NDArray[Any]]) -> Response:
        """The response to errors of several parts of a projection at a time.

        Args:
            arrays: of each part its predicted and measured increases, (points, 2), in one order.
        """
        return cls(tuple((float(a), float(b)) for a, b in sum(arrays[1:], arrays[0]).tolist()))

    def __call__(self, predicted: float) -> float:
        """The increase that belongs to a predicted one."""
        if not self.points or predicted <= 0.0:
            return predicted
        sizes = [each[0] for each in self.points]
        place = bisect_left(sizes, predicted)
        if place == len(sizes):
            size, increase = self.points[-1]
            return predicted * (increase / size)
        if place == 0:
            size, increase = self.points[0]
            slope = self._slope(1) if len(sizes) > 1 else 1.0
            # no ratio above that of the smallest error that was measured
            return max(predicted, increase * exp(max(slope, 1.0) * log(predicted / size)))
        size, increase = self.points[place - 1]
        return max(predicted, increase * exp(self._slope(place) * log(predicted / size)))

    def _slope(self, place: int) -> float:
        """Between a point and the one before, in logarithms."""
        (first, low), (second, high) = self.points[place - 1 : place + 1]
        return log(high / low) / log(second / first)
