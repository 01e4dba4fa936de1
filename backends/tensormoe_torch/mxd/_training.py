"""Training on what an MLP makes of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import repeat
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe._validation import brief, non_negative_int, positive_int
from tensormoe.errors import SpecError
from tensormoe_torch._gate import ExpertGate
from tensormoe_torch._groups import parameter_groups
from tensormoe_torch.mxd._report import Distillation
from tensormoe_torch.surgery._inputs import evaluating

__all__ = ["Course", "Feed", "train"]

# rows that figures are taken of at a time, and at most where none are given for it
_ROWS, _SHOWN = 4096, 8192
# targets shorter than this count as that long: the loss divides by their length
_SHORTEST = 1e-6


@dataclass(frozen=True)
class Course:
    """How a student is trained; see :func:`distill`.

    Raises:
        SpecError: a number that cannot be.
    """

    steps: int
    batch: int
    rate: float
    decay: float
    seed: int
    gate_rate: float | None = None

    def __post_init__(self) -> None:
        positive_int(self.steps, "steps")
        positive_int(self.batch, "batch")
        non_negative_int(self.seed, "seed")
        rates: dict[str, Any] = {"rate": self.rate}
        if self.gate_rate is not None:
            rates["gate_rate"] = self.gate_rate
        for name, rate in rates.items():
            number = isinstance(rate, int | float) and not isinstance(rate, bool)
            if not number or not 0 < rate < float("inf"):
                raise SpecError(f"{name} must be a positive number; got {brief(rate)}. Use 0.001.")

    def share(self, step: int) -> float:
        """The learning rate of a step, as a share of the highest."""
        warm = max(self.steps // 20, 1)
        rest = (step - warm) / max(self.steps - warm, 1)
        return (step + 1) / warm if step < warm else 0.5 + 0.5 * cos(pi * rest)


@dataclass(frozen=True, eq=False)
class Teacher:
    """The MLP, whose answers are checked.

    Args:
        mlp: as the user gave it.
        features: width of its inputs.
    """

    mlp: Callable[[Tensor], Tensor]
    features: int

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.features:
            raise SpecError(f"inputs must have one width; got {x.shape[1]} after {self.features}.")
        quiet = evaluating(self.mlp) if isinstance(self.mlp, nn.Module) else nullcontext()
        try:
            with quiet:
                made: Any = self.mlp(x)
        except (RuntimeError, ValueError, TypeError) as error:
            raise SpecError(
                f"mlp must take inputs {tuple(x.shape)} in {x.dtype}; it raised {error}"
            ) from error
        if not isinstance(made, Tensor) or made.ndim != 2 or len(made) != len(x):
            what = tuple(made.shape) if isinstance(made, Tensor) else brief(made)
            raise SpecError(f"mlp must make a tensor ({len(x)}, out) of inputs; got {what}.")
        if not bool(torch.isfinite(made).all()):
            raise SpecError("mlp must make finite outputs; got NaN or infinity.")
        return made.to(x.dtype)


@dataclass(frozen=True, eq=False)
class Feed:
    """Inputs and targets.

    Args:
        teacher: what makes the targets.
        first: the inputs (rows, in) of the first step.
        rest: those of the others.
        rows: all inputs, where they are known.
    """

    teacher: Teacher
    first: Tensor
    rest: Iterator[Tensor]
    rows: Tensor | None

    @classmethod
    def of(cls, mlp: object, inputs: object, course: Course) -> Feed:
        """Checked inputs, as the user gave them.

        Raises:
            SpecError: no inputs, or no MLP.
        """
        if not callable(mlp):
            raise SpecError(f"mlp must be a module or a function of tensors; got {brief(mlp)}.")
        rows = _rows(inputs, "inputs") if isinstance(inputs, Tensor) else None
        if rows is not None:
            batches = _draws(rows, course)
        elif isinstance(inputs, Iterable):
            batches = (_rows(x, f"inputs of step {step}") for step, x in enumerate(inputs))
        else:
            raise SpecError(
                f"inputs must be a tensor or an iterable of tensors; got {brief(inputs)}."
            )
        first = next(batches, None)
        if first is None:
            raise SpecError("inputs must have a batch for every step; got none.")
        return cls(Teacher(mlp, first.shape[1]), first, batches, rows)

    def batches(self, steps: int) -> Iterator[Tensor]:
        """The inputs of every step.

        Raises:
            SpecError: there are not enough.
        """
        yield self.first
        for step in range(1, steps):
            found = next(self.rest, None)
            if found is None:
                raise SpecError(
                    f"inputs must have a batch for every step; got {step} for {steps} steps. Give "
                    f"more, or steps={step}."
                )
            yield found


def _draws(rows: Tensor, course: Course) -> Iterator[Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(course.seed)
    for _ in repeat(None):
        places = torch.randint(len(rows), (course.batch,), generator=generator)
        yield rows[places.to(rows.device)]


def _rows(x: object, name: str) -> Tensor:
    """Inputs as (rows, in)."""
    if not isinstance(x, Tensor) or x.ndim == 0 or not x.is_floating_point() or not x.numel():
        what = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else brief(x)
        raise SpecError(
            f"{name} must be floating-point tensors (..., in), none of them empty; got {what}."
        )
    rows = x.detach().reshape(-1, x.shape[-1])
    if not bool(torch.isfinite(rows).all()):
        row = int((~torch.isfinite(rows)).any(1).nonzero()[0, 0])
        raise SpecError(f"{name} must be finite; got NaN or infinity in row {row}.")
    return rows


def train(student: nn.Module, feed: Feed, course: Course, held: Tensor | None) -> Distillation:
    """Train a student in place; its report, with figures of ``held``.

    Raises:
        SpecError: inputs or outputs that cannot be, or the loss is no longer finite.
    """
    shown = None if held is None else _rows(held, "held")
    gates = any(isinstance(module, ExpertGate) for module in student.modules())
    if course.gate_rate is not None and not gates:
        raise SpecError(
            f"gate_rate must be left out for a student without an ExpertGate; got "
            f"{course.gate_rate:g} for {type(student).__name__}."
        )
    mode = student.training
    student.train()
    x, losses = feed.first, []
    with torch.enable_grad():
        groups = parameter_groups(student, course.decay, gate_lr=course.gate_rate)
        optimizer = torch.optim.AdamW(groups, lr=course.rate)
        highest = [group["lr"] for group in optimizer.param_groups]
        for step, x in enumerate(feed.batches(course.steps)):
            for group, rate in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = rate * course.share(step)
            target = feed.teacher(x)
            made = student(x)
            if made.shape != target.shape:
                raise SpecError(
                    f"student must make outputs like the MLP's, {tuple(target.shape)}; got "
                    f"{tuple(made.shape)}."
                )
            length = torch.linalg.vector_norm(target, dim=1).clamp_min(_SHORTEST)
            loss = ((made - target).square().sum(1) / length).mean()
            losses.append(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    student.train(mode)
    values = torch.stack(losses).tolist()
    for step, value in enumerate(values):
        if not value < float("inf"):
            raise SpecError(
                f"training must not diverge; the loss became {value} in step {step}. Lower rate, "
                f"which is {course.rate:g}."
            )
    if shown is None:
        shown = x if feed.rows is None else feed.rows[:: -(-len(feed.rows) // _SHOWN)]
    return _report(student, feed.teacher, shown, tuple(values))


@torch.no_grad()
def _report(
    student: Any, teacher: Teacher, rows: Tensor, losses: tuple[float, ...]
) -> Distillation:
    targets = torch.cat([teacher(some) for some in rows.split(_ROWS)]).double()
    missing, active, used = 0.0, 0, torch.zeros(0)
    with evaluating(student):
        for some, target in zip(rows.split(_ROWS), targets.split(_ROWS), strict=True):
            here = torch.cat(tuple(student.coefficients(some)), dim=1) > 0
            missing += float((student(some).double() - target).square().sum())
            active += int(here.sum())
            used = here.any(0) | used if len(used) else here.any(0)
    whole = float((targets - targets.mean(0)).square().sum())
    return Distillation(
        losses,
        len(rows),
        active / len(rows),
        1.0 - missing / whole if whole else float("nan"),
        tuple((~used).nonzero()[:, 0].tolist()),
        len(used),
        sum(each.numel() for each in student.parameters()),
    )
