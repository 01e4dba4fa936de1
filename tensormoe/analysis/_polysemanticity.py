"""Polysemanticity of experts: the classes that an expert's absence costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensormoe._validation import non_negative_int, positive_int
from tensormoe.analysis._interventions import Interventions

if TYPE_CHECKING:
    from numpy.typing import NDArray


def polysemanticity(found: Interventions) -> NDArray[Any]:
    """Class-level polysemanticity (N,) of every expert: 0 for one that serves one class alone.

    d is the share of each class's right predictions that the expert's absence costs, divided by its
    sum; the measure is ‖d - e_c‖₂ with e_c the one-hot vector at d's largest entry. Oldfield et al.
    2024, section 4.1, plot such a distance; this formula is ours, as theirs is not public. NaN for
    experts whose absence costs nothing: take ``numpy.nanmean``.

    An expert that costs a single prediction has 0 by necessity:
    :func:`chance_polysemanticity` says what so few predictions would give at random.

    Args:
        found: interventions on the experts, over all batches.

    >>> import numpy as np
    >>> lost = np.array([[4, 0], [2, 2], [0, 0]])
    >>> correct = np.array([4, 4])
    >>> polysemanticity(Interventions(lost, 0 * lost, correct, correct)).round(3).tolist()
    [0.0, 0.707, nan]
    """
    return _distances(found.lost, found.correct)


def chance_polysemanticity(found: Interventions, *, draws: int = 10, seed: int = 0) -> NDArray[Any]:
    """Polysemanticity (N,) of experts that cost as many right predictions, drawn at random.

    Every right prediction is equally likely to be among them; the mean of some draws. NaN for
    experts whose absence costs nothing.

    Args:
        found: interventions on the experts, over all batches.
        draws: per expert.
        seed: of the draws.

    Raises:
        SpecError: numbers that cannot be.

    >>> import numpy as np
    >>> lost = np.array([[1, 0], [20, 20], [0, 0]])
    >>> correct = np.array([100, 100])
    >>> chance_polysemanticity(Interventions(lost, 0 * lost, correct, correct)).round(1).tolist()
    [0.0, 0.6, nan]
    """
    import numpy as np

    draws = positive_int(draws, "draws")
    rng = np.random.default_rng(non_negative_int(seed, "seed"))
    counts, total = found.lost.sum(axis=1), max(int(found.correct.sum()), 1)
    made = np.full(len(counts), np.nan)
    # experts that cost as many have one value
    for count in np.unique(counts[counts > 0]):
        drawn = rng.multinomial(count, found.correct / total, size=draws)
        made[counts == count] = _distances(drawn, found.correct).mean()
    return made


def _distances(lost: NDArray[Any], correct: NDArray[Any]) -> NDArray[Any]:
    """Distance of each row's shares of right predictions, divided by their sum, to one-hot."""
    import numpy as np

    effect = lost / np.maximum(correct, 1)
    total = effect.sum(axis=1, keepdims=True)
    shares = np.divide(effect, total, out=np.full_like(effect, np.nan), where=total > 0)
    nearest = np.eye(effect.shape[1])[effect.argmax(axis=1)]
    distances: NDArray[Any] = np.sqrt(((shares - nearest) ** 2).sum(axis=1))
    return distances
