"""Losses of a model when one projection is factorized, at a few ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from tensormoe._validation import brief, is_number, positive_int
from tensormoe.errors import SpecError
from tensormoe.factorizations import Factorization


@dataclass(frozen=True)
class SensitivityPoint:
    """One rank of one projection, and what the model loses by it.

    Args:
        factorization: with its rank.
        parameters: entries of the factors.
        loss: in any unit, the same for all projections of a model; losses of several projections
            are added. Negative ones, which noise makes, count as zero.
    """

    factorization: Factorization
    parameters: int
    loss: float

    def __post_init__(self) -> None:
        if not isinstance(self.factorization, Factorization):
            raise SpecError(
                "factorization of a sensitivity must be a value such as CP(8); got "
                f"{brief(self.factorization)}."
            )
        number = positive_int(self.parameters, "parameters of a sensitivity")
        object.__setattr__(self, "parameters", number)
        if not is_number(self.loss) or not isfinite(self.loss):
            raise SpecError(
                f"loss of a sensitivity must be a finite number; got {self.loss!r} for "
                f"{self.factorization!r}. Measure it anew."
            )


@dataclass(frozen=True)
class Sensitivity:
    """Losses by one projection at several ranks.

    Args:
        name: of the projection in the model, one of :attr:`LayerSite.unit_names`.
        points: at least one, in any order.

    >>> from tensormoe import CP
    >>> points = [SensitivityPoint(CP(rank), 20 * rank, 1 / rank) for rank in (1, 2, 4)]
    >>> len(Sensitivity("layers.0.mlp.experts.up_proj", points).points)
    3
    """

    name: str
    points: tuple[SensitivityPoint, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise SpecError(f"name of a sensitivity must be a string; got {brief(self.name)}.")
        listed: Any = self.points
        if (
            not isinstance(listed, tuple | list)
            or not listed
            or not all(isinstance(each, SensitivityPoint) for each in listed)
        ):
            raise SpecError(
                f"points of the sensitivity of {self.name!r} must be SensitivityPoint values, at "
                f"least one; got {brief(listed)}."
            )
        ordered = sorted(listed, key=lambda each: each.parameters)
        object.__setattr__(self, "points", tuple(ordered))


Sensitivities = Mapping[str, float] | Iterable[Sensitivity]
"""A weight for each projection by name, or what was measured of each."""


def checked_sensitivities(
    given: Any, names: Iterable[str]
) -> dict[str, float] | dict[str, Sensitivity]:
    """Sensitivities by name: one for each projection, all of one form.

    Raises:
        SpecError: something else, unknown, missing or repeated names, or weights that are not
            positive and finite.
    """
    wanted = list(names)
    found: dict[str, Any] = {}
    if isinstance(given, Mapping):
        for name, weight in given.items():
            if not is_number(weight) or not 0 < weight < float("inf"):
                raise SpecError(
                    f"sensitivities must be positive, finite numbers; got {weight!r} for "
                    f"{brief(name)}. Measure it anew."
                )
            found[name] = float(weight)
    else:
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise SpecError(
                "sensitivities must be a mapping from names to numbers, or Sensitivity values; got "
                f"{brief(given)}."
            )
        for place, each in enumerate(given):
            if not isinstance(each, Sensitivity):
                raise SpecError(
                    f"sensitivities must be Sensitivity values; got {brief(each)} at {place}."
                )
            if each.name in found:
                raise SpecError(f"sensitivities must be one per name; got {each.name!r} twice.")
            found[each.name] = each
    unknown = [name for name in found if name not in wanted]
    missing = [name for name in wanted if name not in found]
    if unknown or missing:
        what = f"unknown {unknown[0]!r}" if unknown else f"none for {missing[0]!r}"
        raise SpecError(
            f"sensitivities must be given for each of the {len(wanted)} projections, such as "
            f"{wanted[0]!r}; got {what}. They are those of LayerSite.unit_names."
        )
    return found
