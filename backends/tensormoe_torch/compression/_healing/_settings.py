"""Settings of the healing of a compressed model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import cos, isfinite, pi
from typing import Any

from tensormoe._validation import choice, is_number, positive_int
from tensormoe.errors import SpecError

TRAIN = ("factors", "factors only", "all")


@dataclass(frozen=True)
class Healing:
    """Settings of the healing of a compressed model.

    Args:
        steps: of AdamW, one batch each.
        train: ``"factors"`` for factors and routers, ``"factors only"``, or ``"all"`` for every
            parameter of the model.
        lr: the highest learning rate: it rises from zero over the first steps, and falls to zero
            by a cosine.
        warmup: share of the steps over which it rises, in [0, 1).
        labels: share of the loss that is the cross-entropy of the text's own next tokens, in
            [0, 1]; the rest is the divergence from the original's predictions.
        weight_decay: as of :func:`tensormoe_torch.parameter_groups`.
        clip: norm of the gradients at most.

    Raises:
        SpecError: an unknown name, or numbers that cannot be.

    >>> Healing(steps=100).rate(9), Healing(steps=100).rate(99) < 1e-5
    (0.001, True)
    """

    steps: int
    train: str = "factors"
    lr: float = 1e-3
    warmup: float = 0.1
    labels: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        positive_int(self.steps, "steps")
        choice(self.train, TRAIN, "train", SpecError)
        _number(self.lr, "lr", positive=True)
        _number(self.warmup, "warmup", below=1.0)
        _number(self.labels, "labels", most=1.0)
        _number(self.weight_decay, "weight_decay")
        _number(self.clip, "clip", positive=True)

    def share(self, step: int) -> float:
        """The learning rate of a step, counted from zero, as a share of the highest."""
        warm = int(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / warm
        return 0.5 + 0.5 * cos(pi * (step - warm) / (self.steps - warm))

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from zero."""
        return self.lr * self.share(step)

    def to_dict(self) -> dict[str, Any]:
        """The settings in plain values."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def _number(
    value: object,
    name: str,
    *,
    positive: bool = False,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """Refuse what is not a number in a range.

    Raises:
        SpecError: it is not.
    """
    number: Any = value
    good = is_number(value) and isfinite(number) and (number > 0 if positive else number >= 0)
    good = good and (below is None or number < below) and (most is None or number <= most)
    if not good:
        rule = "a positive number" if positive else "a number of at least 0"
        rule += "" if below is None else f" and below {below:g}"
        rule += "" if most is None else f" and at most {most:g}"
        raise SpecError(f"{name} must be {rule}; got {value!r}.")
