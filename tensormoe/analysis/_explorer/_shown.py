"""Options of an exploration that say what a page shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensormoe._validation import brief, instance, positive_int
from tensormoe.analysis._explorer._examples import (
    LONGEST_CELL,
    Examples,
    Images,
    Table,
    Texts,
    Tokens,
    cut,
)
from tensormoe.errors import ShapeError, SpecError


@dataclass(frozen=True, eq=False)
class Shown:
    """Parts of an exploration besides numbers.

    Args:
        examples: the inputs as people see them, or None.
        class_names: one per class, or None.
        classes: their number, or None.
        top: inputs per expert.
        title: of the page.
    """

    examples: Examples | None
    class_names: Sequence[str] | None
    classes: int | None
    top: int
    title: str

    def __post_init__(self) -> None:
        # a frozen value holds plain integers
        object.__setattr__(self, "top", positive_int(self.top, "top"))
        if self.classes is not None:
            object.__setattr__(self, "classes", positive_int(self.classes, "classes"))
        instance(self.title, str, "title", "a string", SpecError)
        if self.examples is not None:
            kinds = (Images, Texts, Tokens, Table)
            what = "Images, Texts, Tokens or Table"
            instance(self.examples, kinds, "examples", what, SpecError)
        if self.class_names is None:
            return
        names = self.class_names
        listed_names = isinstance(names, list | tuple)
        if not listed_names or not all(isinstance(name, str) for name in names):
            raise SpecError(f"class_names must be strings, one per class; got {brief(names)}.")
        if self.classes not in (None, len(names)):
            raise SpecError(
                f"class_names must be one per class; got {len(names)} for {self.classes} classes."
            )

    def size(self, logits: int | None) -> int | None:
        """The number of classes, if it is known without labels."""
        known = self.classes if self.class_names is None else len(self.class_names)
        if logits is not None and known not in (None, logits):
            raise ShapeError(
                f"classes must be those of the {logits} logits; got {known}. Name all of them."
            )
        return logits if known is None else known

    def names(self, size: int | None) -> tuple[str, ...]:
        """One name per class, numbers by default."""
        if size is None:
            return ()
        names = self.class_names or [str(number) for number in range(size)]
        return tuple(cut(name, LONGEST_CELL) for name in names)
