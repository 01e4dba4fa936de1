"""An exploration: what is known of every expert, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

from tensormoe._format import format_experts
from tensormoe.analysis._explorer._top import TopInputs
from tensormoe.analysis._histograms import ClassHistogram, Specialization, specialization
from tensormoe.analysis._interventions import Interventions
from tensormoe.analysis._polysemanticity import polysemanticity
from tensormoe.analysis._use import ExpertLoad
from tensormoe.errors import ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Contributions:
    """Parts of an input's logits that come from the experts of one level.

    Args:
        experts: (m,) numbers of those that the input uses.
        logits: (m, C) their coefficients times their outputs; over all m, they sum to the logits.
    """

    experts: NDArray[Any]
    logits: NDArray[Any]


@dataclass(frozen=True)
class RecordedInput:
    """An input that is among the top ones of an expert.

    Args:
        content: what a person sees of it: ``image`` (a data URI), ``text``, ``tokens`` with
            ``first`` (its first token's place, from the input), or ``cells``; nothing if unknown.
        label: its class, or None.
        logits: (C,) of the whole model, or None.
        contributions: one entry per level where logits are linear in every expert; else none.
    """

    content: Mapping[str, Any]
    label: int | None = None
    logits: tuple[float, ...] | None = None
    contributions: tuple[Contributions, ...] = field(default=(), compare=False)


@dataclass(frozen=True, eq=False)
class NearestExperts:
    """The experts whose matrices have the largest cosines with each expert's.

    Args:
        numbers: (N, m), the nearest first.
        cosines: (N, m).
    """

    numbers: NDArray[Any]
    cosines: NDArray[Any]


@dataclass(frozen=True, eq=False)
class ExploredLevel:
    """All that is known of the experts of one level.

    Args:
        load: use of every expert.
        histogram: coefficients by expert and class; None without labels.
        interventions: predictions that change without each expert; None without labels or logits.
        top: the inputs with the largest coefficients.
        nearest: None where no factors are known, or of one expert.
        affected: the same as ``top`` of inputs whose prediction is another one without the expert;
            None where no logits are known.
    """

    load: ExpertLoad
    histogram: ClassHistogram | None
    interventions: Interventions | None
    top: TopInputs
    nearest: NearestExperts | None = None
    affected: TopInputs | None = None

    @property
    def experts(self) -> int:
        """N."""
        return int(self.load.mass.size)

    @cached_property
    def specialization(self) -> Specialization | None:
        """Divergence from all inputs' classes, with its baseline; None without labels."""
        return None if self.histogram is None else specialization(self.histogram)

    @cached_property
    def polysemanticity(self) -> NDArray[Any] | None:
        """(N,), or None without interventions."""
        return None if self.interventions is None else polysemanticity(self.interventions)

    def _plus(self, other: ExploredLevel, start: int) -> ExploredLevel:
        return ExploredLevel(
            self.load + other.load,
            _sum(self.histogram, other.histogram, "labels"),
            _sum(self.interventions, other.interventions, "labels and logits"),
            self.top + other.top.shifted(start),
            self.nearest,
            _sum(
                self.affected,
                None if other.affected is None else other.affected.shifted(start),
                "logits",
            ),
        )


@dataclass(frozen=True, eq=False)
class Exploration:
    """Behaviour of every expert over one or more batches of inputs: :func:`explore` makes it.

    Those of batches add up, in the order of the inputs. :meth:`save` writes a page or a data file.

    Args:
        inputs: T, their number.
        levels: one per level of the hierarchy.
        grids: (N_e, N_{e+1}) mean products of coefficients, for each two consecutive levels.
        recorded: the inputs that any expert has among its top or affected ones, by number.
        class_names: one per class; none without classes.
        columns: names of the columns of tables; none for other inputs.
        scales: of an expert, for which ``top.changed`` has logits.
        linear: whether logits are linear in every expert, so that all other scales follow.
        title: of the page.
    """

    inputs: int
    levels: tuple[ExploredLevel, ...]
    grids: tuple[NDArray[Any], ...]
    recorded: Mapping[int, RecordedInput]
    class_names: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    linear: bool = False
    title: str = "Experts"

    def __add__(self, other: Exploration) -> Exploration:
        """Both, with the other's inputs behind these.

        Raises:
            ShapeError: explorations of different experts, classes, columns or scales.
        """
        if not isinstance(other, Exploration):
            return NotImplemented
        for name in ("experts", "class_names", "columns", "scales", "linear"):
            one, two = getattr(self, name), getattr(other, name)
            if one != two:
                raise ShapeError(
                    f"explorations must have the same {name} to be added; got {one} and {two}. "
                    "Pass class_names or classes, and the same options, for every batch."
                )
        levels = tuple(
            one._plus(two, self.inputs) for one, two in zip(self.levels, other.levels, strict=True)
        )
        inputs = self.inputs + other.inputs
        shares = self.inputs / max(inputs, 1), other.inputs / max(inputs, 1)
        grids = tuple(
            one * shares[0] + two * shares[1]
            for one, two in zip(self.grids, other.grids, strict=True)
        )
        recorded = dict(self.recorded) | {
            number + self.inputs: each for number, each in other.recorded.items()
        }
        wanted = wanted_inputs(levels)
        kept = {number: recorded[number] for number in sorted(wanted)}
        return replace(self, inputs=inputs, levels=levels, grids=grids, recorded=kept)

    @property
    def experts(self) -> tuple[int, ...]:
        """One number per level."""
        return tuple(level.experts for level in self.levels)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a page (``.html``) or a data file (``.json``); what was there stays whole.

        The page needs no network, no server and no other file. The data file holds the same
        numbers and all that is left out of the page; :meth:`load` opens it.

        Args:
            path: ends in ``.html`` or ``.json``.

        Raises:
            SpecError: another extension, or a file that cannot be written.
        """
        from tensormoe._files import write_file
        from tensormoe.analysis._explorer._file import checked_path, to_json

        target = checked_path(path)
        write_file(target, (self.html() if target.suffix.lower() == ".html" else to_json(self)))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Exploration:
        """The exploration of a data file.

        Raises:
            CheckpointError: not such a file, or one of another version.
        """
        from tensormoe.analysis._explorer._file import read_json

        return read_json(path)

    def html(self) -> bytes:
        """The page."""
        from tensormoe.analysis._explorer._page import page

        return page(self)

    def __repr__(self) -> str:
        return (
            f"Exploration({format_experts(self.experts)} experts, {self.inputs:,} inputs, "
            f"{len(self.class_names)} classes, {len(self.recorded):,} recorded inputs)"
        )

    def _repr_html_(self) -> str:
        from tensormoe.analysis._explorer._page import in_notebook

        return in_notebook(self)


def wanted_inputs(levels: tuple[ExploredLevel, ...]) -> set[int]:
    """Numbers of the inputs that are among the top ones of an expert."""
    tops = [each for level in levels for each in (level.top, level.affected) if each is not None]
    return {number for each in tops for number in each.numbers.ravel().tolist()} - {-1}


def _sum(one: Any, two: Any, what: str) -> Any:
    if (one is None) != (two is None):
        raise ShapeError(
            f"explorations must all have {what} to be added, or none; got one of each. Pass them "
            "for every batch."
        )
    return None if one is None else one + two
