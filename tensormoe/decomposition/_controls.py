"""Truncated singular value decompositions, which factors have to beat at as many parameters.

Squares of singular values come from Gram matrices in float64. Those are right to 1e-16 of the
squared norm, so that errors down to about 1e-8 of the norm are told from zero: less than what
rounding the weights to float32 takes. In float32, whatever is below 3e-4 would be noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from tensormoe._format import format_share
from tensormoe.decomposition._solve import from_host, to_host
from tensormoe.decomposition._source import Source
from tensormoe.functional._dtypes import widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

EACH = "each expert"
ROWS, COLUMNS, EXPERTS = UNFOLDINGS = ("N·in × out", "in × N·out", "N × in·out")
"""All experts as one matrix: stacked, side by side, and one row per expert."""

EXACT = 2048
"""The largest side of which all singular values are computed beyond those of the experts' matrices.

A larger one would take longer than most searches: of it, as many are estimated as are kept."""

TURNS = 4
"""Products of the tensor with itself for an estimate."""

# entries of a piece of the tensor, in float64
_PIECE = 2**18
# the fewest singular values that are estimated beyond those that are kept
_SPARE = 8
# what is closer by no more than this share is as close, and by no more than this it is rounding
_EVEN, _ROUNDING = 1e-3, 1e-6


@dataclass(frozen=True)
class Control:
    """A truncated singular value decomposition of the experts, with no more parameters.

    Args:
        unfolding: the matrix that it is of: ``"each expert"``, one by one, or one of all experts:
            ``"N·in × out"``, ``"in × N·out"`` or ``"N × in·out"``.
        rank: singular values that are kept; of each expert, of all of them together, the largest.
        parameters: stored entries, (rows + columns) for each: at most those of the factors.
        error: relative Frobenius error, of weights and biases together.
        exact: whether that is the error, and not an upper bound close to it.
    """

    unfolding: str
    rank: int
    parameters: int
    error: float
    exact: bool = True

    def __str__(self) -> str:
        most = "" if self.exact else "at most "
        return f"{self.unfolding} {most}{format_share(self.error)} ({self.parameters:,})"


def best_joint(controls: Sequence[Control]) -> Control | None:
    """The one of all experts together with the smallest error."""
    joint = (each for each in controls if each.unfolding != EACH)
    return min(joint, key=lambda each: each.error, default=None)


def closest(controls: Sequence[Control], error: float) -> Control | None:
    """The one with the smallest error, if factors that are off by ``error`` are farther off."""
    best = min(controls, key=lambda each: each.error, default=None)
    return best if best and best.error < (1.0 - _EVEN) * error - _ROUNDING else None


def verdict(control: Control, error: float) -> str:
    """Sentence about a truncated singular value decomposition that is closer than the factors.

    >>> verdict(Control("N·in × out", 3, 120, 0.71), 0.74)
    'a joint SVD of the (N·in × out) unfolding is closer at no more parameters: 71.0% against 74.0%'
    """
    what = (
        "SVDs of each expert are"
        if control.unfolding == EACH
        else f"a joint SVD of the ({control.unfolding}) unfolding is"
    )
    most = "" if control.exact else "at most "
    errors = f"{format_share(control.error)} against {format_share(error)}"
    return f"{what} closer at no more parameters: {most}{errors}"


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """Squares of the largest singular values of a matrix, or of several ones.

    Args:
        squares: falling; NumPy's.
        total: of all squares.
        cost: parameters for each.
        exact: whether they are exact, and all there are.
    """

    squares: NDArray[Any]
    total: float
    cost: int
    exact: bool = True

    def control(self, unfolding: str, parameters: int) -> Control:
        rank = min(parameters // self.cost, len(self.squares))
        # the rest is summed directly where it is known: a difference would lose digits
        rest = self.squares[rank:].sum() if self.exact else self.total - self.squares[:rank].sum()
        error = sqrt(max(float(rest), 0.0) / self.total) if self.total else 0.0
        return Control(unfolding, rank, rank * self.cost, error, self.exact)


@dataclass(frozen=True, eq=False)
class Spectra:
    """Singular values of experts, one by one and unfolded.

    Args:
        known: by unfolding; one with a side above :data:`EXACT` that nothing estimates is missing.
    """

    known: Mapping[str, _Spectrum]

    def controls(self, parameters: int) -> tuple[Control, ...]:
        """Truncated ones with at most so many parameters.

        Args:
            parameters: at most those that the spectra were made for.
        """
        return tuple(each.control(name, parameters) for name, each in self.known.items())


def spectra(source: Source, parameters: int) -> Spectra:
    """The singular values of a tensor, a few matrices of an expert in memory at a time.

    Args:
        source: the tensor, without weights.
        parameters: the most that is asked for later.
    """
    *levels, rows, columns = source.shape
    count = prod(levels)
    costs = {ROWS: count * rows + columns, COLUMNS: rows + count * columns}
    short, long = (COLUMNS, ROWS) if rows <= columns else (ROWS, COLUMNS)
    each, narrow, wide = _along_both(source)
    total = float(narrow.sum())
    found = {short: _Spectrum(narrow, total, costs[short])}
    # sides of which the other one has fewer have zeros at the end
    most = min(max(rows, columns), count * min(rows, columns))
    if wide is not None:
        found[long] = _Spectrum(wide[:most], total, costs[long])
    else:
        kept = min(estimated(max(rows, columns), parameters // costs[long]), most)
        squares = _largest(source, long == ROWS, kept)
        found[long] = _Spectrum(squares, total, costs[long], False)
    if min(count, rows * columns) <= EXACT:
        squares = _eigenvalues(_gram_of_experts(source))
        found[EXPERTS] = _Spectrum(squares, float(squares.sum()), count + rows * columns)
    known = {EACH: _Spectrum(each, total, rows + columns)}
    return Spectra(known | {name: found[name] for name in UNFOLDINGS if name in found})


def _along_both(source: Source) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
    """Squares of experts one by one, of all along the narrow side, and along the wide one.

    The last is None where that side is above :data:`EXACT`.
    """
    import numpy as np

    narrow, wide = sorted(source.shape[-2:])
    each, joint = [], np.zeros((narrow, narrow))
    other = np.zeros((wide, wide)) if wide <= EXACT else None
    for matrix in source.matrices():
        flat = to_host(matrix, source.backend).astype("float64")
        flat = flat if len(flat) == narrow else flat.T
        gram = flat @ flat.T
        joint += gram
        each.append(np.linalg.eigvalsh(gram))
        del gram
        if other is not None:
            step = max(1, _PIECE // wide)
            for start in range(0, wide, step):
                other[start : start + step] += flat[:, start : start + step].T @ flat
    squares = _falling(np.concatenate(each)), _eigenvalues(joint)
    del joint
    return *squares, None if other is None else _eigenvalues(other)


def estimated(side: int, kept: int) -> int:
    """Number of singular values that are estimated so that those that are kept are good."""
    return min(kept + max(_SPARE, kept // 8), side)


def _largest(source: Source, columns: bool, count: int) -> NDArray[Any]:
    """Squares of the largest singular values, none above the true ones, of all columns or rows.

    Subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4) in the dtype of the work.
    """
    import numpy as np

    backend = source.backend
    side = source.shape[-1 if columns else -2]
    sketch = np.random.default_rng(0).standard_normal((side, count), dtype="float32")
    for _ in range(TURNS):
        sketch = np.linalg.qr(sketch)[0]
        basis = from_host(sketch, source.like, backend)
        total: NDArray[Any] | None = None
        for matrix in source.matrices():
            matrix = matrix if columns else backend.permute(matrix, (1, 0))
            back = backend.permute(matrix, (1, 0))
            part = backend.matmul(back, backend.matmul(matrix, basis))
            total = part if total is None else total + part
        basis, sketch = sketch, to_host(total, backend)
        del total
    # what the tensor has in the space that was found, along its own axes there
    inner = basis.T.astype("float64") @ sketch.astype("float64")
    return _eigenvalues((inner + inner.T) / 2.0)


def _gram_of_experts(source: Source) -> NDArray[Any]:
    """Of the matrix (N, in·out), its smaller side."""
    import numpy as np

    *levels, rows, columns = source.shape
    count = prod(levels)
    if rows * columns < count:
        gram = np.zeros((rows * columns,) * 2)
        for span in source.blocks():
            flat = to_host(source.block(*span), source.backend).astype("float64")
            flat = flat.reshape(-1, rows * columns)
            gram += flat.T @ flat
        return gram
    gram = np.zeros((count, count))
    for piece in _rows(source):
        flat = to_host(piece, source.backend).astype("float64").reshape(count, -1)
        gram += flat @ flat.T
    return gram


def _rows(source: Source) -> Iterator[NDArray[Any]]:
    """The same rows of all experts, some at a time."""
    *levels, rows, columns = source.array.shape
    step = max(1, _PIECE // (prod(levels) * columns))
    for start in range(0, rows, step):
        yield widened(source.array[..., start : start + step, :], source.backend) * source.scale
    if source.bias is not None:
        yield widened(source.bias, source.backend) * source.scale


def _eigenvalues(gram: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    return _falling(np.linalg.eigvalsh(gram))


def _falling(values: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    return np.sort(np.maximum(values, 0.0))[::-1]
