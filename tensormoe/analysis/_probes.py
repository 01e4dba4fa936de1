"""Linear probes on the coefficients of a few experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensormoe._extras import require
from tensormoe._validation import non_negative_int, positive_int
from tensormoe.analysis._inputs import checked_labels, dense_rows, host
from tensormoe.errors import ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# a probe on fewer examples of one kind says nothing
_FEWEST = 50


@dataclass(frozen=True, eq=False)
class Probe:
    """A probe of a concept on a few experts.

    Args:
        experts: their numbers.
        f1: on inputs that the probe was not fitted to.
        balanced_accuracy: the same, as the mean over both kinds.
    """

    experts: NDArray[Any]
    f1: float
    balanced_accuracy: float


def sparse_probe(
    coefficients: Any,
    labels: Any,
    k: int = 1,
    *,
    experts: int | None = None,
    candidates: int = 100,
    seed: int = 0,
) -> Probe:
    """The best linear probe of a concept on k experts.

    Experts are ranked by the difference of their mean coefficients on the inputs that show the
    concept and on those that do not, in the training part of three quarters; a logistic regression
    with balanced classes is fitted to the first k (k-sparse probing, arXiv 2604.02178). For k = 1,
    each of the first ``candidates`` experts is tried by itself, and the one with the best F1 on the
    training part is taken (Oldfield et al. 2025, arXiv 2505.21364).

    Args:
        coefficients: of one level: an array (..., N), a ``TopK``, or a routing record.
        labels: (...,) 1 for inputs that show the concept, 0 for the others.
        k: number of experts.
        experts: N, which a ``TopK`` does not tell.
        candidates: single experts that are tried.
        seed: of the split.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
        ShapeError: labels that are not 0 and 1, one per input, or fewer than 50 of one kind.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> labels = rng.integers(0, 2, 400)
    >>> sparse_probe(np.stack([rng.random(400), labels], axis=1), labels)
    Probe(experts=array([1]), f1=1.0, balanced_accuracy=1.0)
    """
    require("probes", ("numpy", "sklearn"), "demo")
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score, f1_score
    from sklearn.model_selection import train_test_split

    dense, backend = dense_rows(coefficients, experts)
    values = host(dense, backend)
    numbers, _ = checked_labels(labels, len(values), 2)
    k, seed = positive_int(k, "k"), non_negative_int(seed, "seed")
    counts = np.bincount(numbers, minlength=2)
    if counts.min() < _FEWEST:
        raise ShapeError(
            f"labels must show and not show the concept {_FEWEST} times at least; got "
            f"{counts[1]} and {counts[0]}. Pass more inputs."
        )
    if k > values.shape[1]:
        raise ShapeError(f"k must be at most the {values.shape[1]} experts; got {k}. Lower it.")
    train, test = train_test_split(
        np.arange(len(values)), test_size=0.25, stratify=numbers, random_state=seed
    )
    seen, known = values[train], numbers[train]
    difference = np.abs(seen[known == 1].mean(axis=0) - seen[known == 0].mean(axis=0))
    order = np.argsort(-difference, kind="stable")

    def fitted(chosen: NDArray[Any]) -> LogisticRegression:
        spread = np.maximum(seen[:, chosen].std(axis=0), 1e-12)
        model = LogisticRegression(class_weight="balanced", max_iter=1000)
        return model.fit(seen[:, chosen] / spread, known), spread

    def predicted(chosen: NDArray[Any], part: NDArray[Any]) -> NDArray[Any]:
        model, spread = fitted(chosen)
        found: NDArray[Any] = model.predict(values[part][:, chosen] / spread)
        return found

    chosen = order[:k]
    if k == 1:
        tried = [order[place : place + 1] for place in range(min(candidates, len(order)))]
        chosen = max(tried, key=lambda each: f1_score(known, predicted(each, train)))
    answer = predicted(chosen, test)
    return Probe(
        chosen,
        float(f1_score(numbers[test], answer)),
        float(balanced_accuracy_score(numbers[test], answer)),
    )
