"""The best slice of an expert factor for a given expert: least squares in the factor's bonds.

With everything else fixed, an expert's matrix and bias are linear in its slice of one factor. The
normal equations of that fit are themselves contractions of the network, twice over, so that the
matrix of the fit (in·out rows) is never built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tensormoe.factorizations import (
    INPUT,
    OUTPUT,
    Leg,
    Network,
    expert_axes,
    expert_carriers,
    expert_leg,
)

__all__ = ["fit_expert"]

# a second round takes away what rounding in the first one left
_ROUNDS = 2

# turns of factors that an expert has a part in, and the share of the error that must be gained
_SWEEPS = 500
_SETTLED = 1e-10


@dataclass(frozen=True, eq=False)
class _Part:
    """An expert's matrix, or its bias: which factors make each term, and what it should be."""

    terms: tuple[tuple[str, ...], ...]
    legs: tuple[Leg, ...]
    target: Tensor


def fit_expert(
    network: Network,
    level: int,
    slices: Mapping[str, Tensor],
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[dict[str, Tensor], float]:
    """The slices that bring an expert closest to a given one, in the sum of squares.

    Where several are equally close, those nearest to the present ones. Where an expert has a part
    in several factors, they are fitted by turns, from their present values, until none of them
    gains anything alone.

    Args:
        network: of the layer.
        level: whose expert it is.
        slices: every array of the layer by name, with the expert's index picked in those that have
            one; real floating point, on any device.
        weight: (other levels' experts…, in, out).
        bias: (other levels' experts…, out), or None to leave biases out of the fit.

    Returns:
        The new slices by name, in their dtype and on their device, and the error of the expert
        that they make, relative to the given one.
    """
    held = expert_leg(level)
    wide = {name: array.detach().to("cpu", torch.float64) for name, array in slices.items()}
    fit = _Fit(network, held)
    parts = [fit.weight(weight.detach().to("cpu", torch.float64))]
    if bias is not None:
        parts.append(fit.bias(bias.detach().to("cpu", torch.float64)))
    carriers = expert_carriers(network, level)
    unknowns = {
        name: [part for part in parts if any(name in names for names in part.terms)]
        for name in (*carriers, *expert_axes(network, level))
    }
    unknowns = {name: fitted for name, fitted in unknowns.items() if fitted}
    scale = _norm([part.target for part in parts])

    def missing() -> float:
        return _norm([fit.contract(part, wide) - part.target for part in parts])

    for name in carriers:
        for _ in range(_ROUNDS if name in unknowns else 0):
            if not scale and len(network.terms) == 1:
                wide[name] = torch.zeros_like(wide[name])
                continue
            wide[name] = wide[name] + fit.step(name, unknowns[name], wide)
    if not {*unknowns} <= {*carriers}:
        error = missing()
        for _ in range(_SWEEPS):
            before = error
            for name, fitted in unknowns.items():
                wide[name] = wide[name] + fit.step(name, fitted, wide)
            error = missing()
            # also where nothing is left to gain but rounding
            if error <= _SETTLED * scale or before - error <= _SETTLED * before:
                break
    found = {name: wide[name].to(slices[name]) for name in unknowns}
    wide |= {name: array.to("cpu", torch.float64) for name, array in found.items()}
    error = missing()
    return found, error / scale if scale else error


class _Fit:
    """The contractions of a fit: legs as the numbers that ``torch.einsum`` wants."""

    def __init__(self, network: Network, held: Leg) -> None:
        self.network = network
        self.sizes = network.sizes
        self.levels = tuple(leg for leg in network.expert_legs if leg != held)
        self.open = {*self.levels, INPUT, OUTPUT}
        self.legs = {
            factor.name: tuple(leg for leg in factor.legs if leg != held)
            for factor in network.all_factors
        }
        self.ids = {leg: place for place, leg in enumerate(network.sizes)}

    def weight(self, target: Tensor) -> _Part:
        names = tuple(tuple(each.name for each in term.factors) for term in self.network.terms)
        return _Part(names, (*self.levels, INPUT, OUTPUT), target)

    def bias(self, target: Tensor) -> _Part:
        names = tuple(tuple(each.name for each in term.bias_factors) for term in self.network.terms)
        return _Part(names, (*self.levels, OUTPUT), target)

    def contract(self, part: _Part, arrays: Mapping[str, Tensor]) -> Tensor:
        """What the factors make of a part."""
        total = torch.zeros_like(part.target)
        for names in part.terms:
            carried = {leg for name in names for leg in self.legs[name]}
            legs = [leg for leg in part.legs if leg in carried]
            operands = [(arrays[name], self._ids(self.legs[name])) for name in names]
            made = self._einsum(operands, legs)
            # a term without the experts of a level is in all of them
            total += made.reshape([self.sizes[k] if k in carried else 1 for k in part.legs])
        return total

    def step(self, name: str, parts: Sequence[_Part], arrays: Mapping[str, Tensor]) -> Tensor:
        """The change of one slice that brings the parts closest to their targets."""
        legs = self.legs[name]
        # open legs of the slice couple nothing: one small system for each of their indices
        free = [leg for leg in legs if leg in self.open]
        bonds = [leg for leg in legs if leg not in self.open]
        ones = (arrays[name].new_ones([self.sizes[leg] for leg in free]), self._ids(free))
        grams, rights = [], []
        for part in parts:
            term = next(names for names in part.terms if name in names)
            rest = [(arrays[other], self.legs[other]) for other in term if other != name]
            once = [(array, self._ids(other)) for array, other in rest]
            twice = [(array, self._ids(other, primed=True)) for array, other in rest]
            pairs = [each for pair in zip(once, twice, strict=True) for each in pair]
            residual = part.target - self.contract(part, arrays)
            primed = self._ids(bonds, primed=True)
            grams.append(self._einsum([ones, *pairs], [*free, *bonds], primed))
            start = (residual, self._ids(part.legs))
            rights.append(self._einsum([ones, start, *once], [*free, *bonds]))
        count = prod(self.sizes[leg] for leg in bonds)
        gram, right = torch.stack(grams).sum(0), torch.stack(rights).sum(0)
        change = _solve(gram.reshape(-1, count, count), right.reshape(-1, count))
        ordered = [*free, *bonds]
        change = change.reshape([self.sizes[leg] for leg in ordered])
        return change.permute([ordered.index(leg) for leg in legs])

    def _ids(self, legs: Sequence[Leg], primed: bool = False) -> list[int]:
        """Numbers of legs; those of the network's second copy, which shares the open ones."""
        shift = len(self.ids) if primed else 0
        return [self.ids[leg] + (0 if leg in self.open else shift) for leg in legs]

    def _einsum(
        self,
        operands: Sequence[tuple[Tensor, list[int]]],
        legs: Sequence[Leg],
        more: Sequence[int] = (),
    ) -> Tensor:
        flat = [each for operand in operands for each in operand]
        return torch.einsum(*flat, [*self._ids(legs), *more])


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """The shortest solutions (systems, p) of symmetric systems (systems, p, p)."""
    count = gram.shape[-1]
    if count == 1:
        values, vectors = gram[..., 0], torch.ones_like(gram)
    else:
        values, vectors = torch.linalg.eigh(gram)
    # below this, eigenvalues are rounding of the largest one
    floor = count * torch.finfo(gram.dtype).eps * values.abs().amax(dim=-1, keepdim=True)
    kept = values > floor
    inverse = torch.where(kept, 1.0 / torch.where(kept, values, 1.0), 0.0)
    turned = (right.unsqueeze(-2) @ vectors).squeeze(-2) * inverse
    return (vectors @ turned.unsqueeze(-1)).squeeze(-1)


def _norm(arrays: Sequence[Tensor]) -> float:
    return float(sum(float((array * array).sum()) for array in arrays) ** 0.5)
