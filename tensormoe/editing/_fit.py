"""The factors of one expert that bring it closest to a given matrix.

All other factors are fixed. The problem is that of decomposition for a tensor of one expert, and so
are its contractions. Its equations may be singular, where a bond is larger than the matrix can use;
they are solved by pseudoinverses, so that what makes no difference does not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import TYPE_CHECKING, Any

from tensormoe.backend import Array, Backend, get_backend
from tensormoe.decomposition._als import along_bonds, squares
from tensormoe.decomposition._bias_rows import with_bias_rows, without_bias_rows
from tensormoe.decomposition._contractions import Structure, plan_update, structures
from tensormoe.decomposition._solve import from_host, wide
from tensormoe.decomposition._source import Source
from tensormoe.decomposition._starts import given
from tensormoe.errors import ShapeError
from tensormoe.factorizations import (
    INPUT,
    OUTPUT,
    Network,
    expert_axes,
    expert_carriers,
    expert_leg,
)
from tensormoe.functional._dtypes import cast, widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

# a second round takes away what rounding in the first one left
_ROUNDS = 2
# rounds of factors that are fitted by turns, and the share of the error that one must gain
_TURNS, _SETTLED = 500, 1e-10


def fit_expert(
    network: Network,
    level: int,
    slices: Mapping[str, Array],
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
    backend: Backend,
) -> tuple[dict[str, Array], float]:
    """The slices that bring an expert closest to a given one, in the sum of squares.

    Of several that are equally close, those nearest to the present ones. Where an expert has a part
    in several factors, they are fitted by turns, from their present values, until none of them
    gains anything alone. The work is done on the host in float64.

    Args:
        network: of the layer.
        level: whose expert it is.
        slices: every array of the layer by name; those with experts of the level have one.
        weight: (experts…, in, out), with one expert of the level; NumPy's, in float64.
        bias: (experts…, out), or None to leave biases out of the fit.
        backend: the adapter of the slices' library.

    Returns:
        The new slices by name, in the dtype and on the device of the old ones, and the error of the
        expert that they make, relative to the given one.

    Raises:
        ShapeError: present or new slices that are not finite.
    """
    host = get_backend("numpy")
    target = Source(weight, host, bias)
    sizes = {**network.sizes, expert_leg(level): 1, INPUT: target.shape[-2]}
    terms = structures(network, (*network.expert_legs, INPUT, OUTPUT), sizes)

    def stacked(arrays: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
        found = {name: wide(array, backend) for name, array in arrays.items()}
        if not all(host.namespace.isfinite(array).all() for array in found.values()):
            raise ShapeError(
                "the layer's factors and the fitted ones must be finite; got some that are not. "
                "Train the layer in a wider dtype, or give a smaller weight."
            )
        return found if bias is None else with_bias_rows(network, found, host)

    factors = stacked(slices)
    for term in terms:
        factors |= given(term, target)
    _solve(network, level, terms, target, factors)
    wanted = set(expert_axes(network, level))
    if bias is not None:
        changed = without_bias_rows(network, factors)
    else:
        changed = factors
        wanted -= {term.bias.name for term in network.terms if term.bias is not None}
    found = {name: _like(changed[name], slices[name], backend) for name in wanted}
    left = target.without(terms, factors | stacked({**slices, **found}))
    scale, error = sqrt(target.squared_norm()), sqrt(left.squared_norm())
    return found, error / scale if scale else error


def _solve(
    network: Network,
    level: int,
    terms: tuple[Structure, ...],
    target: Source,
    factors: dict[str, NDArray[Any]],
) -> None:
    """Replace the factors of an expert: those it is linear in first, then all of them by turns."""
    leg = expert_leg(level)
    holders = {each.name: term for term in terms for each in term.wanted if leg in each.legs}
    carriers = [name for name in expert_carriers(network, level) if name in holders]
    for name in carriers * _ROUNDS:
        if len(terms) == 1 and not target.squared_norm():
            factors[name] = factors[name] * 0.0
        else:
            factors[name] = factors[name] + _step(holders[name], name, terms, target, factors)
    if len(carriers) == len(holders):
        return
    scale, before = sqrt(target.squared_norm()), sqrt(target.without(terms, factors).squared_norm())
    for _ in range(_TURNS):
        for name, term in holders.items():
            factors[name] = factors[name] + _step(term, name, terms, target, factors)
        error = sqrt(target.without(terms, factors).squared_norm())
        # also where nothing is left to gain but rounding
        if error <= _SETTLED * scale or before - error <= _SETTLED * before:
            break
        before = error


def _step(
    structure: Structure,
    name: str,
    terms: tuple[Structure, ...],
    target: Source,
    factors: Mapping[str, NDArray[Any]],
) -> NDArray[Any]:
    """The smallest change of one factor that brings the network closest to the target."""
    import numpy as np

    update = plan_update(structure, name)
    residual = target.without(terms, factors)
    right = residual.contract(
        structure, lambda each: (plan_update(each, name).mttkrp, update.legs), factors
    )
    inverses = []
    for square in squares(update, factors, target.backend):
        # below this, eigenvalues are rounding of the largest one
        floor = square.shape[-1] * np.finfo(square.dtype).eps
        inverses.append(np.linalg.pinv(square, rcond=floor, hermitian=True))
    return along_bonds(inverses, right, update).transpose(update.axes)


def _like(array: NDArray[Any], like: Array, backend: Backend) -> Array:
    """An array of the library from the host's, in the dtype and on the device of another."""
    return cast(from_host(array, widened(like, backend), backend), like.dtype, backend)
