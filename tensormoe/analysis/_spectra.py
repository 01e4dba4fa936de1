"""Low-rank analysis of trained matrices: spectra, and accuracy against what is kept of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from tensormoe._validation import is_number
from tensormoe.analysis._inputs import host
from tensormoe.backend import Array, backend_of
from tensormoe.decomposition._solve import from_host
from tensormoe.errors import ShapeError, SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def spectrum(matrix: Array) -> NDArray[Any]:
    """Singular values of a matrix of any library, largest first, in float64.

    Raises:
        ShapeError: not a matrix.

    >>> import numpy as np
    >>> spectrum(np.diag([1.0, 3.0, 2.0])).tolist()
    [3.0, 2.0, 1.0]
    """
    import numpy as np

    found: NDArray[Any] = np.linalg.svd(_matrix(matrix), compute_uv=False)
    return found


def truncated(matrix: Array, share: float) -> Array:
    """The best approximation of a matrix by a share of its singular values.

    Args:
        matrix: of any library.
        share: of the singular values that are kept, in [0, 1]; rounded up.

    Returns:
        A matrix in the dtype and on the device of the given one.

    Raises:
        ShapeError: not a matrix.
        SpecError: a share that cannot be.

    >>> import numpy as np
    >>> truncated(np.diag([1.0, 3.0, 2.0]), 0.5).round(9).tolist()
    [[0.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 2.0]]
    """
    import numpy as np

    left, values, right = np.linalg.svd(_matrix(matrix), full_matrices=False)
    kept = ceil(checked_share(share) * values.size)
    made = (left[:, :kept] * values[:kept]) @ right[:kept]
    return from_host(made, matrix, backend_of(matrix))


@dataclass(frozen=True)
class RankCurve:
    """A model's score against the share of singular values that its matrices keep.

    Args:
        shares: in the given order.
        scores: one per share.
    """

    shares: tuple[float, ...]
    scores: tuple[float, ...]


def rank_curve(
    matrices: Mapping[str, Array],
    evaluate: Callable[[Mapping[str, Array]], float],
    shares: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
) -> RankCurve:
    """Score of a trained model against the share of its layers' spectra that is kept.

    All matrices are truncated to the same share of their singular values; a curve that stays up is
    why experts of low rank can do (Oldfield et al. 2024, appendix on low-rank structure).

    Args:
        matrices: by name.
        evaluate: the score of the model with other matrices of these names.
        shares: of the singular values that are kept.

    Raises:
        ShapeError, SpecError: as :func:`truncated`.

    >>> import numpy as np
    >>> weight = np.diag([4.0, 3.0, 0.0, 0.0])
    >>> def error(changed):
    ...     return float(np.abs(changed["w"] - weight).max())
    >>> rank_curve({"w": weight}, error, (0.25, 0.5)).scores
    (3.0, 0.0)
    """
    scores = tuple(
        float(evaluate({name: truncated(array, share) for name, array in matrices.items()}))
        for share in shares
    )
    return RankCurve(tuple(float(share) for share in shares), scores)


def checked_share(share: float) -> float:
    """A share between 0 and 1."""
    if not is_number(share) or not 0 <= share <= 1:
        raise SpecError(f"share must lie in [0, 1]; got {share!r}.")
    return float(share)


def _matrix(array: Array) -> NDArray[Any]:
    if array.ndim != 2:
        raise ShapeError(f"matrix must have two axes; got shape {tuple(array.shape)}.")
    return host(array)
