"""Second moments that errors are weighted by, and those errors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING, Any

from tensormoe.errors import ShapeError, SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

RIDGE = 1e-3
"""Of the mean second moment, added to all: directions that no sample shows are not free."""

LARGE = 2**22
"""Entries up to which a matrix is widened before its error is computed."""

# rows of a product of two large matrices that are held at a time
_STRIP = 512


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments that the error of a decomposition is weighted by, on the host.

    The error of experts Wₙ (in, out) with rebuilt ones Ŵₙ is

        Σₙ pₙ tr(M Δₙᵀ S Δₙ),  Δₙ = Wₙ − Ŵₙ:

    with S = E[x xᵀ], the expected squared error of the outputs y = Wₙᵀ x in the metric M, of
    experts that are used with shares pₙ. What is not given weighs alike. Only ratios count. Where
    every expert has moments Sₙ of its own, networks whose input side is each expert's own, such as
    :class:`tensormoe.LowRank`, are fitted to them, others to their mean; errors are exact for both.

    Args:
        inputs: S, (in, in), or Sₙ, (N, in, in); with biases (in + 1, in + 1), the last input being
            1.
        outputs: M, (out, out), positive definite: second moments of a loss's gradients with respect
            to the outputs, or of the outputs themselves, so that errors count more in directions
            that carry more.
        experts: p, (N,), not negative.
        ridge: share of the mean of the diagonal of S that is added to it, positive, and of the mean
            of p that each expert is worth at least. Both decide what is searched for, not the
            errors that are reported.

    Raises:
        ShapeError: arrays of other shapes, not finite, not symmetric, or with negative entries on
            a diagonal.
        SpecError: nothing is given, or a ridge that is not a positive number.

    >>> import numpy as np
    >>> Moments(inputs=np.diag([1.0, 4.0])).features
    (2, None, None)
    """

    inputs: NDArray[Any] | None = None
    outputs: NDArray[Any] | None = None
    experts: NDArray[Any] | None = None
    ridge: float = RIDGE

    def __post_init__(self) -> None:
        import numpy as np

        if self.inputs is None and self.outputs is None and self.experts is None:
            raise SpecError("moments must have inputs, outputs or experts; got none of them.")
        if not isinstance(self.ridge, float) or not 0.0 < self.ridge < float("inf"):
            raise SpecError(f"ridge must be a positive float; got {self.ridge!r}. The usual: 1e-3.")
        for name in ("inputs", "outputs", "experts"):
            if (given := getattr(self, name)) is not None:
                found = np.asarray(given)
                if found.dtype.kind != "f":
                    raise ShapeError(f"{name} of moments must be floats; got {found.dtype}.")
                if name == "experts":
                    _check_shares(found, name)
                elif name == "inputs" and found.ndim == 3 and len(found):
                    for each in found:
                        _check_symmetric(each, name)
                else:
                    _check_symmetric(found, name)
                object.__setattr__(self, name, found)

    @property
    def features(self) -> tuple[int | None, int | None, int | None]:
        """Sizes of inputs, outputs and experts, as far as they are given."""
        given = self.inputs, self.outputs, self.experts
        inputs, outputs, experts = (None if each is None else each.shape[-1] for each in given)
        return (
            inputs,
            outputs,
            len(self.inputs) if self.apart and self.inputs is not None else experts,
        )

    @property
    def apart(self) -> bool:
        """Whether every expert has second moments of its own inputs."""
        return self.inputs is not None and self.inputs.ndim == 3

    def pooled(self) -> Moments:
        """The same with the mean of all experts' inputs, as often as each is used."""
        import numpy as np

        if not self.apart:
            return self
        shares = self.experts
        mean = np.average(np.asarray(self.inputs), axis=0, weights=shares)
        return replace(self, inputs=mean)

    def check(self, shape: tuple[int, ...], bias: bool) -> None:
        """Refuse weights of other sizes.

        Args:
            shape: of the weights, (experts…, in, out), biases not included.
            bias: whether they have biases.

        Raises:
            ShapeError: they have other sizes, or several levels where experts weigh differently.
        """
        *experts, rows, columns = shape
        wanted = (rows + bias, columns, experts[0])
        names = ("inputs", "outputs", "experts")
        found_sizes = self.features
        if self.experts is not None and self.apart and len(self.experts) != found_sizes[2]:
            raise ShapeError(
                f"experts of moments must be as many as inputs are given for; got "
                f"{len(self.experts)} and {found_sizes[2]}."
            )
        for name, found, size in zip(names, found_sizes, wanted, strict=True):
            if found is not None and found != size:
                more = " with the row of the biases" if name == "inputs" and bias else ""
                raise ShapeError(
                    f"{name} of moments must have {size} entries per axis{more} for weights of "
                    f"shape {shape}; got {found}."
                )
        if (self.experts is not None or self.apart) and len(experts) > 1:
            raise ShapeError(
                f"moments of single experts need weights of one level; got {len(experts)}. Leave "
                "them out."
            )

    def error(self, pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> float:
        """Relative error of experts: the root of what is missing over what was there.

        Args:
            pairs: of every expert its matrix (in, out), and what is missing of it.
        """

        def squares() -> Iterable[tuple[float, float]]:
            for place, (matrix, missing) in enumerate(pairs):
                share, given = self.share(place), (self._inputs(place), self.outputs)
                yield share * energy(missing, *given), share * energy(matrix, *given)

        return relative(squares())

    def _inputs(self, place: int) -> NDArray[Any] | None:
        return self.inputs[place] if self.apart and self.inputs is not None else self.inputs

    def share(self, place: int) -> float:
        """Weight of an expert."""
        return 1.0 if self.experts is None else float(self.experts[place])


def energy(
    matrix: NDArray[Any], inputs: NDArray[Any] | None, outputs: NDArray[Any] | None
) -> float:
    """tr(M Wᵀ S W) of a matrix W (in, out), in float64, or for a large one in its own dtype.

    Args:
        matrix: W.
        inputs: S, (in, in) and symmetric; None for ones.
        outputs: M, (out, out) and symmetric; None for ones.
    """
    import numpy as np

    left = matrix if matrix.size > LARGE else matrix.astype("float64")
    right = left if outputs is None else left @ outputs.astype(left.dtype, copy=False)
    if inputs is None:
        return max(float(np.sum(left * right, dtype="float64")), 0.0)
    total, size = 0.0, len(left)
    # W M Wᵀ is symmetric: strips of one half of it, so that no more is held
    for start in range(0, size, _STRIP):
        stop = min(start + _STRIP, size)
        weights = inputs[start:stop, start:].astype(left.dtype)
        weights[:, stop - start :] *= 2.0
        weights *= left[start:stop] @ right[start:].T
        total += float(np.sum(weights, dtype="float64"))
    # rounding may leave less than nothing
    return max(total, 0.0)


def relative(squares: Iterable[tuple[float, float]]) -> float:
    """The root of a sum of squares over another one; 0 for nothing of nothing."""
    missing, whole = (sum(column) for column in zip(*squares, strict=True))
    if whole == 0.0:
        return 0.0 if missing == 0.0 else float("inf")
    return sqrt(missing / whole)


def _check_symmetric(found: NDArray[Any], name: str) -> None:
    import numpy as np

    if found.ndim != 2 or found.shape[0] != found.shape[1] or not found.size:
        raise ShapeError(f"{name} of moments must be a square matrix; got shape {found.shape}.")
    largest = np.abs(found).max()
    if not np.isfinite(largest):
        raise ShapeError(f"{name} of moments must be finite; got NaN or infinity.")
    if np.abs(found - found.T).max() > 1e-5 * largest or found.diagonal().min() < 0.0:
        raise ShapeError(
            f"{name} of moments must be symmetric, with a diagonal that is not negative; this "
            "matrix is not. Second moments of samples x (samples, size) are x.T @ x / samples."
        )


def _check_shares(found: NDArray[Any], name: str) -> None:
    import numpy as np

    if found.ndim != 1 or not found.size:
        raise ShapeError(f"{name} of moments must have shape (N,); got {found.shape}.")
    if not np.isfinite(found).all() or found.min() < 0.0 or not found.any():
        raise ShapeError(f"{name} of moments must be finite, not negative and not all 0.")
