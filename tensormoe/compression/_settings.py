"""Settings of the compression of a model's experts."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

from tensormoe._format import plain_rank
from tensormoe._rounding import AUTO as AUTO_BITS
from tensormoe._rounding import checked_bits_or_auto
from tensormoe._validation import (
    brief,
    choice,
    instance,
    non_negative_int,
    positive_int,
    positive_ints,
)
from tensormoe.checkpoint._files import checkpoint_path
from tensormoe.compression._calibration import EXPERT_WEIGHTS, WEIGHTINGS
from tensormoe.compression._gate_up import GATE_UP
from tensormoe.compression._patterns import AUTO, LAYOUTS, PRESETS, Pattern
from tensormoe.compression._sharing import SHARES
from tensormoe.decomposition._choose import checked_tolerance
from tensormoe.decomposition._search import checked_seconds
from tensormoe.decomposition._several import several
from tensormoe.errors import BudgetError, RankError, SpecError
from tensormoe.factorizations import Factorization, factorization_class, rank_pattern
from tensormoe.selection import Allocation


@dataclass(frozen=True)
class Compression:
    """Settings of the compression of a model's experts.

    Args:
        factorization: name of one that :func:`tensormoe.decomposition.decompose` fits, such as
            ``"tensor_ring"``, or the class of that name. With a budget also several of them, or
            ``"auto"``: each group gets the one that loses least, of outputs where there is a
            calibration.
        rank: bond sizes, for every group of experts; one integer stands for all bonds. Of rank,
            budget and tolerance one must be given, but for a factorization without rank.
        budget: what the factors may take instead: as a float in (0, 1) a share of each group's
            entries (of its bytes, with bits), as an integer the entries of all groups together,
            shared out by their sizes.
        tolerance: relative error in (0, 1) that each group is to reach instead, with as few
            entries as can be.
        experts: patterns of the experts' keys, one for each projection; see :class:`Pattern`.
        preset: name of a family of models instead, one of :data:`PRESETS`, or ``"auto"`` for the
            one that the model's ``config.json`` and keys tell; that is what it is where neither is
            given.
        layout: how a matrix is stored, one of :data:`LAYOUTS`.
        dense: whether to write the experts' matrices, rebuilt from their factors, under their old
            keys, instead of the factors.
        compare: whether to compute the errors of truncated singular value decompositions of no more
            parameters.
        seed: of the random starts, a non-negative integer.
        seconds: a time limit for the search of each group; None for no limit. With one, the bytes
            of the output depend on the machine.
        allocation: ranks of all groups instead of rank, budget and tolerance, from
            :func:`tensormoe.selection.allocate`; all of the one factorization.
        calibration: path of a :class:`Calibration`'s file, to minimize the error of outputs rather
            than that of weights, and to report it.
        weighting: what of the calibration errors are weighted by, one of :data:`WEIGHTINGS`.
        expert_weights: what an expert counts, one of :data:`EXPERT_WEIGHTS`.
        share: how the budget of all groups is shared out, one of :data:`SHARES`: the same share of
            each, or, with a calibration, more for those by which the model loses more.
        bits: 8 or 4 to round the factors to the nearest integers of so many bits, with a scale for
            every 64 entries; 16 or None for entries as they are. A budget that is a share is then
            one of the experts' bytes, and ``"dense"``, which rounds the experts themselves, needs
            none. With a calibration ``"auto"``: each group is stored as it loses least within its
            bytes, in 16, 8 or 4 bits, and factors or the experts themselves.
        gate_up: how gate and up projection are decomposed, one of :data:`GATE_UP`: as they are
            stored, ``"joined"`` as one tensor, ``"apart"`` as two, or ``"auto"``, within a budget:
            each layer gets the way that loses less of the outputs, or of the loss, where there is a
            calibration, and of the weights elsewhere.

    Raises:
        SpecError: an unknown name, an invalid pattern, a seed, tolerance or limit that cannot
            be, other bits, values that exclude one another, or weights without a calibration.
        RankError: a rank of other values than positive integers.
        BudgetError: a budget that is neither a share nor a positive integer.

    >>> Compression("tensor_ring", budget=0.25, preset="mixtral").budget
    0.25
    >>> Compression("cp", tolerance=0.1, experts=("layers.3.experts.*.w1",)).to_dict()["experts"]
    ['layers.3.experts.*.w1']
    """

    factorization: str | type[Factorization] | tuple[str, ...]
    rank: int | tuple[int, ...] | None = None
    budget: int | float | None = None
    tolerance: float | None = None
    experts: tuple[str, ...] = ()
    preset: str | None = None
    layout: str = "auto"
    dense: bool = False
    compare: bool = True
    seed: int = 0
    seconds: float | None = None
    allocation: Allocation | None = None
    calibration: str | None = None
    weighting: str = "inputs"
    expert_weights: str = "equal"
    share: str = "equal"
    bits: int | str | None = None
    gate_up: str = "stored"

    def __post_init__(self) -> None:
        put = object.__setattr__
        _check_promise(self)
        self._check_factorization()
        if self.allocation is not None:
            _check_allocation(self.allocation, self.factorization)
        if self.rank is not None:
            sizes = positive_ints(self.rank, "rank", "bond", RankError)
            put(self, "rank", sizes if isinstance(self.rank, tuple) else sizes[0])
        if isinstance(self.budget, float):
            if not 0 < self.budget < 1:
                raise BudgetError(
                    "a budget that is a float is a share of the experts' entries, in (0, 1); got "
                    f"{self.budget!r}. Give an integer for a number of entries."
                )
        elif self.budget is not None:
            put(self, "budget", positive_int(self.budget, "budget", BudgetError))
        if self.tolerance is not None:
            put(self, "tolerance", checked_tolerance(self.tolerance))
        self._check_experts()
        choice(self.layout, LAYOUTS, "layout", SpecError)
        non_negative_int(self.seed, "seed")
        if self.seconds is not None:
            put(self, "seconds", checked_seconds(self.seconds))
        self._check_calibration()
        self._check_gate_up()

    def _check_gate_up(self) -> None:
        """The way of gate and up projection, and what it can be chosen by."""
        choice(self.gate_up, GATE_UP, "gate_up", SpecError)
        if self.gate_up == "auto" and self.budget is None:
            raise SpecError(
                "gate_up='auto' compares both ways at equal bytes, and needs a budget; got none. "
                "Give for example a budget of 0.25, or one of 'joined' and 'apart'."
            )

    def _check_factorization(self) -> None:
        """The names of factorizations, and what their size is given by."""
        put = object.__setattr__
        choices = several(self.factorization, None)
        names = ("rank", "budget", "tolerance", "allocation")
        given = [name for name in names if getattr(self, name) is not None]
        if choices is not None:
            if not choices.auto:
                put(self, "factorization", tuple(map(_registered, choices.names)))
            if given != ["budget"]:
                raise SpecError(
                    "one of several factorizations is chosen within a budget; got "
                    f"{' and '.join(given) or 'none'}. Give for example a budget of 0.25."
                )
            return
        name = _registered(self.factorization)  # type: ignore[arg-type]
        put(self, "factorization", name)
        if len(given) > 1 or (not given and rank_pattern(name)):
            raise SpecError(
                f"one of rank, budget and tolerance must be given; got {' and '.join(given)}."
                if given
                else "one of rank, budget and tolerance must be given; got none. Give for example "
                "a budget of 0.25."
            )

    def _check_experts(self) -> None:
        """The patterns, or the family."""
        put = object.__setattr__
        patterns: Any = self.experts
        listed = isinstance(patterns, tuple | list)
        if not listed or not all(isinstance(each, str) for each in patterns):
            raise SpecError(f"experts must be a tuple of patterns; got {brief(patterns)}.")
        put(self, "experts", tuple(Pattern(each).text for each in patterns))
        if self.preset is not None and self.experts:
            raise SpecError(
                "patterns of experts or a preset may be given, and not both; got "
                f"{self.experts!r} and {self.preset!r}. Presets are {', '.join(PRESETS)}."
            )
        if not self.experts:
            put(self, "preset", AUTO if self.preset is None else self.preset)
            choice(self.preset, (AUTO, *PRESETS), "preset", SpecError)

    def _check_calibration(self) -> None:
        """The calibration, and what needs one."""
        choice(self.weighting, WEIGHTINGS, "weighting", SpecError)
        choice(self.expert_weights, EXPERT_WEIGHTS, "expert_weights", SpecError)
        choice(self.share, SHARES, "share", SpecError)
        if self.bits == AUTO_BITS and (
            self.calibration is None or not isinstance(self.budget, float)
        ):
            raise SpecError(
                "bits='auto' needs a calibration, and a budget that is a share, such as 0.25. Give "
                "both."
            )
        if self.share != "equal" and (self.calibration is None or self.budget is None):
            raise SpecError(
                "a budget is shared out by sensitivity with a calibration; got no "
                f"{'budget' if self.budget is None else 'calibration'}. Give both."
            )
        if self.calibration is not None:
            # workers read it too, wherever they run
            path = os.path.abspath(checkpoint_path(self.calibration))
            object.__setattr__(self, "calibration", path)
        elif (self.weighting, self.expert_weights) != ("inputs", "equal"):
            raise SpecError(
                "weighting and expert_weights need a calibration; got none. Make one with "
                "tensormoe calibrate-model."
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings in plain values, as JSON knows them."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        plain |= {"experts": list(self.experts), "rank": plain_rank(self.rank)}
        if isinstance(self.factorization, tuple):
            plain["factorization"] = list(self.factorization)
        if self.calibration is None:
            for name in ("calibration", "weighting", "expert_weights"):
                del plain[name]
        if self.share == "equal":
            del plain["share"]
        if self.gate_up == "stored":
            del plain["gate_up"]
        # outputs from before there were bits or allocations go on with the same command
        if self.bits is None:
            del plain["bits"]
        if plain.pop("allocation") is not None:
            assert self.allocation is not None
            plain["allocation"] = self.allocation.to_dict()
        return plain


def _registered(factorization: str | type[Factorization]) -> str:
    """The name of a factorization, which resumed runs and what is written know it by.

    Raises:
        SpecError: it does not lead back to the class.
    """
    kind = factorization_class(factorization)
    if factorization_class(kind.name) is not kind:
        raise SpecError(f"factorization {kind.name!r} must be registered as {kind!r}.")
    return kind.name


def _check_promise(settings: Compression) -> None:
    """Refuse bits that cannot be, or a tolerance that they might not keep.

    Raises:
        SpecError: there are such.
    """
    if checked_bits_or_auto(settings.bits) is not None and settings.tolerance is not None:
        raise SpecError(
            f"a tolerance can't be promised with {settings.bits} bits, whose rounding adds an "
            "error of its own. Give a rank or a budget."
        )


def _check_allocation(allocation: Allocation, name: object) -> None:
    """Refuse what is no allocation of experts in one factorization.

    Raises:
        SpecError: it is none.
    """
    instance(allocation, Allocation, "allocation", "an Allocation", SpecError)
    layers = allocation.of_kind("experts").layers
    if not layers or len(layers) < len(allocation.layers):
        raise SpecError(
            "an allocation must be of experts alone for a model on disk; it has "
            f"{len(layers)} such layers of {len(allocation.layers)}. Give allocation.of_kind("
            "'experts')."
        )
    kinds = {kind.name for layer in layers for kind in layer.factorizations}
    if kinds != {name}:
        raise SpecError(
            f"an allocation must be of the factorization {name!r} alone; it has "
            f"{', '.join(sorted(kinds))}. Allocate with one, and name it."
        )
