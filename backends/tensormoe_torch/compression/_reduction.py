"""Requests for fewer experts, checked before a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensormoe._validation import choice, flag
from tensormoe.compression import allot_experts
from tensormoe.errors import SpecError
from tensormoe_torch.compression._dense import DenseExperts
from tensormoe_torch.compression._read import is_concatenated

WAYS = ("merge", "prune")
GROUPS = ("router", "outputs")
SCORES = ("frequency", "reap")


@dataclass(frozen=True)
class Reduction:
    """A request for fewer experts; arguments are those of :func:`reduce_experts`.

    Raises:
        SpecError: arguments that cannot be, or do not go together.
    """

    keep: int | float
    how: str = "merge"
    groups: str = "router"
    score: str = "frequency"
    uniform: bool = False
    align: bool = True

    def __post_init__(self) -> None:
        choice(self.how, WAYS, "how", SpecError)
        choice(self.groups, GROUPS, "groups", SpecError)
        choice(self.score, SCORES, "score", SpecError)
        flag(self.uniform, "uniform")
        flag(self.align, "align")
        allot_experts([], self.keep)
        if self.how == "prune" and self.groups != "router":
            raise SpecError(
                f"groups are of experts that are merged; got groups={self.groups!r} with "
                "how='prune'. Leave groups out, or merge."
            )
        if self.how == "merge" and self.score != "frequency":
            raise SpecError(
                f"score says which experts are pruned; got score={self.score!r} with how='merge'. "
                "Leave score out, or prune."
            )
        if self.score == "reap" and self.allots:
            raise SpecError(
                "saliencies of different layers do not compare, so score='reap' needs a number of "
                f"experts per layer; got keep={self.keep!r}. Give an integer, or uniform=True."
            )

    @property
    def allots(self) -> bool:
        """Whether a share is allotted over layers, so that they may keep different numbers."""
        return isinstance(self.keep, float) and not self.uniform

    @property
    def criterion(self) -> str:
        """The name of the criterion, for reports."""
        return self.groups if self.how == "merge" else self.score

    def check_experts(self, experts: DenseExperts) -> None:
        """Refuse experts that can't be treated as asked for.

        Raises:
            SpecError: units that can't be permuted, or experts that get no router weights.
        """
        name, module = experts.name, type(experts.module).__name__
        mixed = experts.keeps_biases and not is_concatenated(experts.module)
        if self.how == "merge" and self.align and mixed:
            # permuted units would be gates for one part, and gated for the other
            raise SpecError(
                f"units of experts can't be aligned where gate and up projection take turns, as in "
                f"{name!r} ({module}). Pass align=False."
            )
        if self.score == "reap" and not experts.together:
            raise SpecError(
                f"score='reap' needs the router's weights; the experts of {name!r} ({module}) are "
                "called one by one, and weighted outside. Use score='frequency'."
            )

    def counts(self, frequencies: Sequence[Sequence[float]], least: int) -> tuple[int, ...]:
        """Experts that every layer keeps.

        Args:
            frequencies: of the experts of each layer.
            least: that every layer needs.

        Raises:
            SpecError: a number or a share that these layers can't keep.
        """
        if not self.uniform or not isinstance(self.keep, float):
            return allot_experts(frequencies, self.keep, least=least)
        counts = tuple(round(self.keep * len(each)) for each in frequencies)
        for count, each in zip(counts, frequencies, strict=True):
            if count < least:
                raise SpecError(
                    f"keep must leave every layer {least} experts; got {self.keep!r}, {count} of "
                    f"{len(each)}. Raise it."
                )
        return counts
