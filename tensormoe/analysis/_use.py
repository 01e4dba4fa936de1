"""Use of experts: load, dead experts, histograms of coefficients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tensormoe._validation import is_number, positive_int
from tensormoe.analysis._inputs import host, host_numbers, rows_of
from tensormoe.backend import Array, Backend, device_of
from tensormoe.errors import ShapeError, SpecError
from tensormoe.gates import TopK

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """Use of every expert over a number of inputs; those of several batches add up.

    Args:
        inputs: T, their number.
        mass: (N,) sums of coefficients.
        counts: (N,) inputs whose coefficient is above ``threshold``.
        threshold: as given.
    """

    inputs: int
    mass: NDArray[Any]
    counts: NDArray[Any]
    threshold: float

    @property
    def share(self) -> NDArray[Any]:
        """(N,) mean coefficients."""
        return self.mass / max(self.inputs, 1)

    @property
    def frequency(self) -> NDArray[Any]:
        """(N,) shares of the inputs that use an expert."""
        return self.counts / max(self.inputs, 1)

    @property
    def dead(self) -> NDArray[Any]:
        """Numbers of the experts that no input uses."""
        made: NDArray[Any] = (self.counts == 0).nonzero()[0]
        return made

    @property
    def active(self) -> float:
        """Experts that an input uses, in the mean."""
        return float(self.counts.sum() / max(self.inputs, 1))

    def __add__(self, other: ExpertLoad) -> ExpertLoad:
        if not isinstance(other, ExpertLoad):
            return NotImplemented
        if self.mass.shape != other.mass.shape or self.threshold != other.threshold:
            raise ShapeError(
                "loads must be those of the same experts and threshold to be added; got "
                f"{self.mass.size} at {self.threshold} and {other.mass.size} at {other.threshold}."
            )
        return replace(
            self,
            inputs=self.inputs + other.inputs,
            mass=self.mass + other.mass,
            counts=self.counts + other.counts,
        )


def expert_load(
    coefficients: Any, *, experts: int | None = None, threshold: float = 0.0
) -> ExpertLoad:
    """Use of every expert of one level.

    Args:
        coefficients: of one level: an array (..., N), a ``TopK``, or a routing record.
        experts: N, which a ``TopK`` does not tell.
        threshold: an input uses an expert whose coefficient is larger; the paper counts images with
            at least 0.5 (Oldfield et al. 2024, section 4).

    Raises:
        ShapeError: coefficients of several levels, or of an unknown number of experts.
        SpecError: a threshold that is not a number.

    >>> import numpy as np
    >>> found = expert_load(np.array([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]]))
    >>> found.share.tolist(), found.dead.tolist(), found.active
    ([0.875, 0.125, 0.0], [2], 1.5)
    """
    _check_threshold(threshold)
    found, rows, count, backend = rows_of(coefficients, experts)
    mass = summed(found, None, count, backend)
    used = summed(_above(found, threshold, backend), None, count, backend)
    return ExpertLoad(rows, mass, used.round().astype("int64"), float(threshold))


def activation_histogram(
    coefficients: Any, *, experts: int | None = None, bins: int = 20
) -> NDArray[Any]:
    """Counts (N, bins) of coefficients in equal parts of [0, 1]; those of batches add up.

    The last bin holds 1; coefficients outside are counted in the first and the last bin.

    Args:
        coefficients: as for :func:`expert_load`.
        experts: N, which a ``TopK`` does not tell.
        bins: how many.

    Raises:
        ShapeError, SpecError: as :func:`expert_load`.

    >>> import numpy as np
    >>> activation_histogram(np.array([[0.75, 0.25], [1.0, 0.0]]), bins=2).tolist()
    [[0, 2], [2, 0]]
    """
    import numpy as np

    bins = positive_int(bins, "bins")
    found, _, count, backend = rows_of(coefficients, experts)
    values = host(found.values if isinstance(found, TopK) else found, backend)
    places = np.clip((values * bins).astype(np.int64), 0, bins - 1)
    numbers = np.arange(count)[None, :]
    if isinstance(found, TopK):
        numbers = host_numbers(found.indices, backend).astype(np.int64)
    flat = (np.broadcast_to(numbers, places.shape) * bins + places).reshape(-1)
    made = np.bincount(flat, minlength=count * bins).reshape(count, bins)
    if isinstance(found, TopK):
        # experts that an input does not name have coefficient zero
        made[:, 0] += values.shape[0] - made.sum(axis=1)
    return made


def summed(
    coefficients: Array | TopK, labels: Array | None, experts: int, backend: Backend, size: int = 1
) -> NDArray[Any]:
    """Sums (size, N) of coefficients by label, or (N,) of all; on the host in float64."""
    if isinstance(coefficients, TopK):
        places = coefficients.indices
        if labels is not None:
            places = places + labels[:, None] * experts
        flat = (coefficients.values.shape[0] * coefficients.values.shape[1],)
        found = backend.scatter_add(
            backend.reshape(coefficients.values, flat),
            backend.reshape(places, flat),
            0,
            size * experts,
        )
        made = host(found, backend)
    elif labels is None:
        made = host(backend.sum(coefficients, (0,)), backend)
    else:
        made = host(backend.scatter_add(coefficients, labels, 0, size), backend)
    return made if labels is None else made.reshape(size, experts)


def like_labels(labels: NDArray[Any], like: Array, backend: Backend) -> Array:
    """Labels of the host as an array of a library, where its values are."""
    # an empty list would become an array of floats
    found = backend.namespace.asarray(labels.tolist() or [0], device=device_of(like))
    return found[: labels.size]


def _above(coefficients: Array | TopK, threshold: float, backend: Backend) -> Array | TopK:
    """Ones where a coefficient is above a threshold."""
    xp = backend.namespace
    if isinstance(coefficients, TopK):
        values = coefficients.values
        return TopK(coefficients.indices, xp.astype(values > threshold, values.dtype))
    return xp.astype(coefficients > threshold, coefficients.dtype)


def _check_threshold(threshold: object) -> None:
    if not is_number(threshold):
        raise SpecError(f"threshold must be a number; got {threshold!r}.")
