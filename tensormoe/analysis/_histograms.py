"""Histograms of experts over classes or tokens, and their specialisation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tensormoe._validation import flag, non_negative_int, positive_int
from tensormoe.analysis._inputs import checked_labels, rows_of
from tensormoe.analysis._use import like_labels, summed
from tensormoe.errors import ShapeError
from tensormoe.gates import TopK

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ClassHistogram:
    """Coefficients by expert and class; those of several batches add up.

    Args:
        mass: (N, C) sums of coefficients.
        squares: (N,) sums of their squares.
        inputs: (C,) number of inputs of each class.
    """

    mass: NDArray[Any]
    squares: NDArray[Any]
    inputs: NDArray[Any]

    @property
    def shares(self) -> NDArray[Any]:
        """(N, C) distribution of every expert over classes; NaN for experts that are not used."""
        import numpy as np

        total = self.mass.sum(axis=1, keepdims=True)
        made: NDArray[Any] = np.divide(
            self.mass, total, out=np.full_like(self.mass, np.nan), where=total > 0
        )
        return made

    @property
    def samples(self) -> NDArray[Any]:
        """(N,) effective number of inputs of every expert, (Σa)² / Σa² (Kish 1965).

        The number itself where coefficients are 0 or 1.
        """
        import numpy as np

        total = self.mass.sum(axis=1) ** 2
        made: NDArray[Any] = np.divide(
            total, self.squares, out=np.zeros_like(total), where=self.squares > 0
        )
        return made

    def __add__(self, other: ClassHistogram) -> ClassHistogram:
        if not isinstance(other, ClassHistogram):
            return NotImplemented
        if self.mass.shape != other.mass.shape:
            raise ShapeError(
                "histograms must be those of the same experts and classes to be added; got "
                f"{self.mass.shape} and {other.mass.shape}. Pass classes=C for every batch."
            )
        return replace(
            self,
            mass=self.mass + other.mass,
            squares=self.squares + other.squares,
            inputs=self.inputs + other.inputs,
        )


def class_histogram(
    coefficients: Any,
    labels: Any,
    *,
    classes: int | None = None,
    experts: int | None = None,
    weighted: bool = True,
) -> ClassHistogram:
    """Coefficients of one level, summed by expert and class.

    Classes are any whole numbers that an input has: labels, positions, or tokens of a vocabulary.

    Args:
        coefficients: of one level: an array (..., N), a ``TopK``, or a routing record.
        labels: (...,) one per input, of any library.
        classes: C, larger than any label; by default one more than the largest. Batches that are
            added up need one number.
        experts: N, which a ``TopK`` does not tell.
        weighted: whether an input counts with its coefficient, else with one where that is above
            zero.

    Raises:
        ShapeError: labels that are not one per input, or that cannot be.

    >>> import numpy as np
    >>> found = class_histogram(np.array([[0.75, 0.25], [1.0, 0.0], [0.0, 1.0]]), [0, 0, 1])
    >>> found.mass.tolist(), found.samples.tolist()
    ([[1.75, 0.0], [0.25, 1.0]], [1.96, 1.4705882352941178])
    """
    flag(weighted, "weighted")
    given, rows, count, backend = rows_of(coefficients, experts)
    numbers, size = checked_labels(labels, rows, classes)
    values = given.values if isinstance(given, TopK) else given
    if not weighted:
        values = backend.namespace.astype(values > 0, values.dtype)
    squares = values * values
    if isinstance(given, TopK):
        values, squares = TopK(given.indices, values), TopK(given.indices, squares)
    mass = summed(values, like_labels(numbers, given_array(given), backend), count, backend, size)
    import numpy as np

    return ClassHistogram(
        mass.T.copy(),
        summed(squares, None, count, backend),
        np.bincount(numbers, minlength=size),
    )


def given_array(given: Any) -> Any:
    """One of the arrays of coefficients."""
    return given.values if isinstance(given, TopK) else given


@dataclass(frozen=True, eq=False)
class Specialization:
    """Distance of experts' distributions over classes from that of all inputs, in bits.

    Args:
        divergence: (N,) Jensen–Shannon divergence, between 0 and 1; NaN for unused experts.
        baseline: (N,) that of as many inputs drawn at random, in the mean.
    """

    divergence: NDArray[Any]
    baseline: NDArray[Any]

    @property
    def excess(self) -> NDArray[Any]:
        """(N,) what is above the baseline."""
        made: NDArray[Any] = self.divergence - self.baseline
        return made

    @property
    def mean(self) -> float:
        """Mean excess over the experts that are used; NaN if none is."""
        used = self.excess[self.divergence == self.divergence]
        return float(used.mean()) if used.size else float("nan")


def specialization(histogram: ClassHistogram, *, draws: int = 10, seed: int = 0) -> Specialization:
    """Jensen–Shannon divergence of every expert from all, less its multinomial baseline.

    p_n is an expert's distribution over classes and p that of all inputs, as the experts see
    them: Σ_n of their masses. The divergence is ½ KL(p_n ‖ m) + ½ KL(p ‖ m) with m = (p_n + p)/2,
    base 2. An expert that sees few inputs is far from p by chance alone: the baseline is
    the mean divergence of draws of as many inputs (:attr:`ClassHistogram.samples`) from p
    ("Expert Strikes Back", arXiv 2604.02178).

    Args:
        histogram: of all batches.
        draws: per expert, for the baseline.
        seed: of the draws.

    Raises:
        SpecError: numbers that cannot be.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> labels = rng.integers(0, 4, 400)
    >>> special, random = np.eye(4)[labels], np.eye(4)[rng.integers(0, 4, 400)]
    >>> found = [specialization(class_histogram(a, labels)).mean for a in (special, random)]
    >>> found[0] > 0.5, abs(found[1]) < 0.01
    (True, True)
    """
    import numpy as np

    draws = positive_int(draws, "draws")
    rng = np.random.default_rng(non_negative_int(seed, "seed"))
    total = histogram.mass.sum(axis=0)
    everything = total / total.sum() if total.sum() else np.full_like(total, np.nan)
    shares, samples = histogram.shares, histogram.samples.round().astype(np.int64)
    divergence = jensen_shannon(shares, everything)
    baseline = np.full(len(shares), np.nan)
    # experts with as many inputs have one baseline
    for count in np.unique(samples[samples > 0]):
        drawn = rng.multinomial(count, everything, size=draws) / count
        baseline[samples == count] = jensen_shannon(drawn, everything).mean()
    return Specialization(divergence, baseline)


def jensen_shannon(rows: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """Jensen–Shannon divergence (rows,) of distributions (rows, C) from one (C,), in bits."""
    import numpy as np

    middle = (rows + other) / 2

    def divergence(part: NDArray[Any]) -> NDArray[Any]:
        ratio = np.divide(part, middle, out=np.ones_like(middle), where=part > 0)
        found: NDArray[Any] = (part * np.log2(ratio)).sum(axis=-1)
        return found

    made = (divergence(rows) + divergence(np.broadcast_to(other, rows.shape))) / 2
    return np.where(np.isnan(rows).any(axis=-1), np.nan, made)
