"""Rule by which a router chooses experts, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any

from tensormoe._validation import brief, choice, flag, is_number
from tensormoe.errors import GateError

SCORES = ("softmax", "sigmoid")
"""Functions from logits to scores, by name."""


@dataclass(frozen=True)
class Router:
    """Rule from a token's logits to k experts and their weights.

    Scores are made of the logits of all experts, the k experts with the largest scores are chosen,
    and their scores are the weights. Renormalized softmax scores are the same as a softmax over the
    k largest logits: "softmax, then top-k" and "top-k, then softmax" are both ``Router()``, and the
    weights of Switch Transformers, which do not sum to one, are ``Router(renormalize=False)``.
    DeepSeek-V3 has ``Router("sigmoid", balance=0.001, scale=2.5)``.

    Attributes:
        scores: "softmax" over all experts, or "sigmoid" of each logit alone.
        renormalize: whether the weights of a token are divided by their sum.
        bias: whether the projection has a bias.
        scale: factor of all weights, positive, after renormalization.
        noise: standard deviation of the normal noise that is added to logits in training, for the
            choice alone (Shazeer et al. 2017).
        balance: speed of balancing without a loss (Wang et al. 2024; DeepSeek-V3): each expert has
            a bias that is added to its score for the choice alone, and that each training step
            moves by this much, up for experts below the mean load, down for those above. 0.001 is
            usual; 0 for none.
        capacity: most tokens of an expert, relative to an equal share (1.25 is usual): tokens that
            come later lose the expert, whose weight is then 0. None drops nothing. Which tokens are
            dropped depends on the whole batch.

    Raises:
        GateError: an unknown name or an impossible value.

    >>> Router()
    Router(scores='softmax', renormalize=True, bias=False, scale=1.0, noise=0.0, balance=0.0, \
capacity=None)
    """

    scores: str = "softmax"
    renormalize: bool = True
    bias: bool = False
    scale: float = 1.0
    noise: float = 0.0
    balance: float = 0.0
    capacity: float | None = None

    def __post_init__(self) -> None:
        choice(self.scores, SCORES, "scores", GateError)
        flag(self.renormalize, "renormalize", GateError)
        flag(self.bias, "bias", GateError)
        for name in ("noise", "balance"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < float("inf"):
                raise GateError(
                    f"{name} must be a number that is not negative; got {brief(value)}. Use 0 for "
                    "none."
                )
        for name in ("scale", "capacity"):
            value = getattr(self, name)
            if name == "capacity" and value is None:
                continue
            if not is_number(value) or not (value > 0 and isfinite(value)):
                default = "1.0" if name == "scale" else "1.25, or None for no limit"
                raise GateError(
                    f"{name} must be a positive number; got {brief(value)}. Use {default}."
                )

    @classmethod
    def parse(cls, value: Router | str) -> Router:
        """A router as it is, or one by the name of its scores.

        >>> Router.parse("sigmoid").scores
        'sigmoid'
        """
        if isinstance(value, Router):
            return value
        if not isinstance(value, str):
            raise GateError(
                f"router must be a Router or the name of its scores; got {brief(value)}. Write "
                "Router('softmax', balance=0.001), for instance."
            )
        return cls(value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as checkpoints store them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Router:
        """The router that :meth:`to_dict` described; every field must be there and no other.

        Raises:
            GateError: a field is missing, unknown, or has an impossible value.

        >>> Router.from_dict(Router(noise=1.0).to_dict()) == Router(noise=1.0)
        True
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or {*values} != names:
            raise GateError(
                f"a router's description must have the fields {', '.join(sorted(names))}; got "
                f"{brief(values)}. Pass what Router.to_dict() returned."
            )
        return cls(**values)
