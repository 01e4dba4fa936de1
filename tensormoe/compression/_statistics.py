"""Statistics of a router's choices, by which experts become fewer."""

from __future__ import annotations

from typing import Any

from tensormoe._validation import positive_int
from tensormoe.backend import Array, backend_of
from tensormoe.decomposition._solve import to_host, wide
from tensormoe.errors import ShapeError


def choice_frequencies(index: Array, experts: int) -> tuple[float, ...]:
    """Shares of a router's choices that fall on each expert.

    Args:
        index: (tokens, k) numbers of chosen experts, of any library.
        experts: N.

    Returns:
        N shares, which sum to one.

    Raises:
        ShapeError: no choices, or numbers that are not of these experts.

    >>> import numpy as np
    >>> choice_frequencies(np.array([[0, 2], [2, 1]]), 4)
    (0.25, 0.25, 0.5, 0.0)
    """
    return counted_frequencies(choice_counts(index, experts))


def choice_counts(index: Array, experts: int) -> Any:
    """Counts of choices of each expert, (N,) on the host; counts of several calls add up.

    Raises:
        ShapeError: numbers that are not of these experts.
    """
    import numpy as np

    count = positive_int(experts, "experts")
    backend = backend_of(index)
    if not backend.namespace.isdtype(index.dtype, "integral"):
        raise ShapeError(f"index must hold integers, numbers of experts; got {index.dtype}.")
    found = to_host(index, backend).reshape(-1)
    outside = found[(found < 0) | (found >= count)]
    if outside.size:
        raise ShapeError(
            f"index must hold numbers of experts, 0 to {count - 1}; got {int(outside[0])}."
        )
    return np.bincount(found.astype("int64"), minlength=count)


def counted_frequencies(counts: Any) -> tuple[float, ...]:
    """Shares of counts (N,).

    Raises:
        ShapeError: no choices.
    """
    total = int(counts.sum())
    if not total:
        raise ShapeError("index must hold a choice at least; got none. Give calibration tokens.")
    return tuple((counts / total).tolist())


def cosine_similarity(columns: Array) -> tuple[tuple[float, ...], ...]:
    """Cosines between columns: of router logits (tokens, N), how alike experts are chosen.

    Args:
        columns: (tokens, N) logits of a router, of any library.

    Returns:
        (N, N) cosines; of a column of zeros 0.

    Raises:
        ShapeError: not a matrix, no tokens, or entries that are not finite.

    >>> import numpy as np
    >>> cosine_similarity(np.array([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]]))[0]
    (1.0, 1.0, 0.0)
    """
    if columns.ndim != 2 or not columns.shape[0]:
        raise ShapeError(
            f"logits must be a matrix (tokens, N) of one token at least; got shape "
            f"{tuple(columns.shape)}. Give calibration tokens."
        )
    return product_cosines(column_products(columns))


def column_products(columns: Array) -> Any:
    """Inner products (N, N) of columns (tokens, N), on the host; those of several calls add up."""
    found = wide(columns, backend_of(columns))
    return found.T @ found


def product_cosines(products: Any, what: str = "logits") -> tuple[tuple[float, ...], ...]:
    """Cosines of vectors whose inner products (N, N) are given.

    Raises:
        ShapeError: they are not finite.
    """
    import numpy as np

    squares = np.diag(products)
    if not np.isfinite(products).all():
        place = int(np.argwhere(~np.isfinite(squares))[0][0])
        raise ShapeError(f"{what} must be finite; those of expert {place} are not.")
    lengths = np.sqrt(squares)
    lengths = np.where(lengths == 0.0, 1.0, lengths)
    cosines = np.clip(products / np.outer(lengths, lengths), -1.0, 1.0)
    return tuple(map(tuple, cosines.tolist()))


def reap_saliency(index: Array, weights: Array, norms: Array, experts: int) -> tuple[float, ...]:
    """Saliency of each expert: the mean of router weight times norm of output over its tokens.

    It is REAP's, router-weighted expert activation pruning (Lasby et al. 2025, arXiv 2510.13999):
    s_n = mean of g_n(x) · ‖E_n(x)‖₂ over the tokens x that go to expert n. Unlike a frequency, it
    does not grow with the number of tokens.

    Args:
        index: (tokens, k) numbers of chosen experts, of any library.
        weights: (tokens, k) g, the router's weights, as outputs are multiplied by them.
        norms: (tokens, k) Euclidean norms of the chosen experts' outputs, before the weights.
        experts: N.

    Returns:
        N saliencies; 0 of experts that are never chosen.

    Raises:
        ShapeError: no choices, other shapes, numbers that are not of these experts, or entries that
            are not finite.

    >>> import numpy as np
    >>> index, weights = np.array([[0, 2], [2, 1]]), np.array([[0.75, 0.25], [0.5, 0.5]])
    >>> reap_saliency(index, weights, np.array([[2.0, 4.0], [6.0, 1.0]]), 4)
    (1.5, 0.5, 2.0, 0.0)
    """
    counts = choice_counts(index, experts)
    counted_frequencies(counts)
    return mean_saliency(saliency_sums(index, weights, norms, experts), counts)


def saliency_sums(index: Array, weights: Array, norms: Array, experts: int) -> Any:
    """Sums (N,) of router weight times norm of output; those of several calls add up.

    Raises:
        ShapeError: other shapes, or entries that are not finite.
    """
    import numpy as np

    for name, each in (("weights", weights), ("norms", norms)):
        if tuple(each.shape) != tuple(index.shape):
            raise ShapeError(
                f"{name} must have the shape of index, {tuple(index.shape)}; got "
                f"{tuple(each.shape)}."
            )
    found = to_host(index, backend_of(index)).reshape(-1).astype("int64")
    wide_weights, wide_norms = (
        wide(each, backend_of(each)).reshape(-1) for each in (weights, norms)
    )
    products = wide_weights * wide_norms
    wrong = found[~np.isfinite(products)]
    if wrong.size:
        raise ShapeError(
            f"router weights and norms must be finite; those of expert {int(wrong[0])} are not."
        )
    return np.bincount(found, weights=products, minlength=experts)


def mean_saliency(sums: Any, counts: Any) -> tuple[float, ...]:
    """Saliencies of sums (N,) over the tokens of each expert; 0 without tokens."""
    return tuple((sums / counts.clip(min=1)).tolist())
