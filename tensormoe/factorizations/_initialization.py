"""Initial values of factors: recipes in numbers, drawn by whichever library holds the layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import Literal

from tensormoe.backend import Array, Backend, device_of

__all__ = ["Draw", "Initializer", "apart", "chain_energy", "draw_factor", "noise_share"]

Draw = Callable[[tuple[int, ...]], Array]
"""Draws an array of a shape: standard normal, or uniform on [-1, 1)."""


@dataclass(frozen=True, slots=True)
class Initializer:
    """The distribution of one factor at the start: a center plus independent noise.

    Args:
        std: standard deviation of the noise of every entry.
        distribution: shape of the noise.
        center: what the noise is added to: nothing; ones; for the last two axes a matrix that
            passes every bond on (an identity, tiled where it is not square) or, as in the paper,
            the plain rectangular identity; or one draw shared by all experts.
        center_std: standard deviation of the shared draw.
        expert_axes: along these the shared draw is the same.
        diagonal: multiply the noise by the center, so that it only lands where the center is.
    """

    std: float
    distribution: Literal["normal", "uniform"] = "uniform"
    center: Literal["zero", "one", "identity", "tiled", "shared"] = "zero"
    center_std: float = 0.0
    expert_axes: tuple[int, ...] = ()
    diagonal: bool = False

    def mean_square(self, shape: tuple[int, ...]) -> float:
        """Expected square of an entry, on average over an array of ``shape``.

        >>> Initializer(0.5, center="one").mean_square((4, 3))
        1.25
        """
        noise = self.std**2
        if self.center == "zero":
            return noise
        if self.center == "shared":
            return noise + self.center_std**2
        if self.center == "one":
            return noise + 1.0
        rows, columns = shape[-2:]
        ones = max(rows, columns) if self.center == "tiled" else min(rows, columns)
        share = ones / (rows * columns)
        return share * (1.0 + noise) if self.diagonal else share + noise


def noise_share(levels: int) -> float:
    """Noise variance of an expert factor, relative to its center, for ``levels`` levels.

    Over all levels together the noise carries as much energy as the center: experts differ from
    one another by as much as they share, whatever the depth of the hierarchy. One level gives 1,
    the N(1, 1) of Oldfield et al. 2024, appendix F.2.
    """
    return float(2.0 ** (1.0 / levels) - 1.0)


def chain_energy(bonds: tuple[int, ...], share: float) -> tuple[tuple[float, ...], float]:
    """Noise variances of a chain of tiled-identity matrices, and its mean squared norm.

    Args:
        bonds: the sizes between the matrices, ends included: (r₀, …, r_E).
        share: noise energy of a matrix relative to its center's.

    Returns:
        The noise variance of an entry of each matrix, and E‖M₁⋯M_E‖²_F.
    """
    second = [[float(p == q) for q in range(bonds[0])] for p in range(bonds[0])]
    variances = []
    for rows, columns in pairwise(bonds):
        variance = share * max(rows, columns) / (rows * columns)
        variances.append(variance)
        noise = variance * sum(second[p][p] for p in range(rows))
        second = _pass_center(second, rows, columns)
        for q in range(columns):
            second[q][q] += noise
    return tuple(variances), sum(second[q][q] for q in range(bonds[-1]))


def _pass_center(second: list[list[float]], rows: int, columns: int) -> list[list[float]]:
    """Dᵀ S D for the tiled identity D of shape (rows, columns)."""
    period = min(rows, columns)
    folded = [[0.0] * period for _ in range(period)]
    for p in range(rows):
        for q in range(rows):
            folded[p % period][q % period] += second[p][q]
    return [[folded[p % period][q % period] for q in range(columns)] for p in range(columns)]


def draw_factor(
    initializer: Initializer,
    shape: tuple[int, ...],
    backend: Backend,
    normal: Draw,
    uniform: Draw,
) -> Array:
    """Draw one factor of ``shape``.

    Args:
        initializer: the recipe.
        shape: of the factor.
        backend: adapter of the library that ``normal`` and ``uniform`` draw from.
        normal: draws standard normal arrays of a shape.
        uniform: draws arrays uniform on [-1, 1).
    """

    def noise(shape: tuple[int, ...], std: float) -> Array:
        if initializer.distribution == "normal":
            return normal(shape) * std
        return uniform(shape) * (std * sqrt(3.0))

    array = noise(shape, initializer.std)
    if initializer.center == "zero":
        return array
    xp = backend.namespace
    if initializer.center == "shared":
        axes = initializer.expert_axes
        shared = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
        return array + noise(shared, initializer.center_std)
    if initializer.center == "one":
        return array + 1.0
    rows, columns = shape[-2:]
    center = xp.eye(rows, columns, dtype=array.dtype, device=device_of(array))
    if initializer.center == "tiled":
        period = min(rows, columns)
        block = xp.eye(period, dtype=array.dtype, device=device_of(array))
        center = xp.concat([block] * -(-rows // period), axis=0)[:rows, :]
        center = xp.concat([center] * -(-columns // period), axis=1)[:, :columns]
    return center * (1.0 + array) if initializer.diagonal else center + array


def apart(variance: float, share: float, levels: int) -> Initializer:
    """A draw that all experts share, and noise of ``share`` of its energy.

    Of a factor whose axes are the mode, then all levels of experts, then bonds.
    """
    common = variance / (1.0 + share)
    axes = tuple(range(1, 1 + levels))
    std = sqrt(share * common)
    return Initializer(std, center="shared", center_std=sqrt(common), expert_axes=axes)
