"""A block trained to imitate an MLP, on inputs that the MLP gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from tensormoe._validation import brief, choice, positive_int
from tensormoe.errors import SpecError
from tensormoe_torch._activations import Act
from tensormoe_torch.mxd._block import MixtureOfDecoders
from tensormoe_torch.mxd._report import Distillation
from tensormoe_torch.mxd._training import Course, Feed, train
from tensormoe_torch.surgery._block import read_block
from tensormoe_torch.surgery._convert import copied

__all__ = ["distill", "imitate"]


def distill(
    mlp: nn.Module | Callable[[Tensor], Tensor],
    experts: int | None,
    k: int,
    inputs: Tensor | Iterable[Tensor],
    *,
    transcoder: int | None = None,
    hidden_features: int | None = None,
    act_layer: Act | None = None,
    start: str = "fresh",
    held: Tensor | None = None,
    steps: int = 1000,
    batch: int = 1024,
    rate: float = 1e-3,
    gate_rate: float | None = None,
    decay: float = 0.0,
    seed: int = 0,
) -> tuple[MixtureOfDecoders, Distillation]:
    """A mixture of decoders that imitates an MLP, and how well it does.

    AdamW on the mean over tokens of ‖out − target‖² / ‖target‖ (Oldfield et al. 2025), where the
    targets are what the MLP makes of the inputs; a linear warm-up over a twentieth of the steps,
    then a cosine to zero. The MLP stays as it is. Put the block in its place afterwards:
    ``layer.mlp = block``.

    Args:
        mlp: a module with two linear layers, an activation and dropout, as for :func:`from_mlp`,
            which gives the hidden size and the activation; or any other module or function of
            tensors (rows, in), whose ``hidden_features`` and ``act_layer`` are given. It runs
            without dropout.
        experts: N; None with ``transcoder``.
        k: the most experts per token.
        inputs: what the MLP is given. A tensor (..., in), from which every step draws ``batch``
            rows; or an iterable of such tensors, one for each step.
        transcoder: the width T of a transcoder, instead of ``experts``: the block then has as
            many parameters, N = T − hidden_features.
        hidden_features: of the block; those of the MLP by default.
        act_layer: of the block; that of the MLP by default.
        start: ``"fresh"``, all of it drawn; or ``"mlp"``: the encoder starts as the MLP's first
            layer (:meth:`MixtureOfDecoders.encode_like`), which takes a fraction of the steps.
        held: inputs (..., in) that the report's figures are of; by default up to 8192 rows of
            ``inputs``, or the last step's batch.
        steps: updates.
        batch: rows per step, of ``inputs`` that are a tensor.
        rate: the highest learning rate.
        gate_rate: that of the gate, if another. A tenth keeps more experts in use where ``rate`` is
            high: a step of Adam moves a logit by nearly ``in_features`` times the rate, however
            small logits are.
        decay: weight decay of those parameters that :func:`parameter_groups` lets decay.
        seed: of initial values and batches. PyTorch's generator stays as it is.

    Returns:
        The block, in evaluation mode, in the dtype and on the device of the inputs; and the report.

    Raises:
        SpecError: sizes or options that cannot be, a ``k`` above the number of experts, both or
            neither of ``experts`` and ``transcoder``, an MLP whose hidden size or activation is not
            known, inputs that are empty, not finite, of no floating-point dtype, of another width,
            or too few for the steps; or training diverged.
        GateError: ``k`` is no count.

    >>> import torch
    >>> from torch import nn
    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    >>> block, report = distill(mlp, 64, 4, torch.randn(500, 8), steps=100, rate=0.01)
    >>> report.losses[-1] < 0.5 * report.losses[0], report.active <= 4
    (True, True)
    """
    choice(start, ("fresh", "mlp"), "start", SpecError)
    hidden, act = _known(mlp, hidden_features, act_layer)
    count = _experts(experts, transcoder, hidden)
    course = Course(steps, batch, rate, decay, seed, gate_rate)
    feed = Feed.of(mlp, inputs, course)
    like: Any = {"device": feed.first.device, "dtype": feed.first.dtype}
    with torch.random.fork_rng([feed.first.device] if feed.first.device.type != "cpu" else []):
        torch.manual_seed(seed)
        sizes = (feed.first.shape[1], hidden, feed.teacher(feed.first).shape[1])
        block = MixtureOfDecoders(*sizes, act, experts=count, k=k, **like)
    if start == "mlp":
        block.encode_like(cast(nn.Module, mlp))
    return block.eval(), train(block, feed, course, held)


def imitate(
    student: nn.Module,
    mlp: nn.Module | Callable[[Tensor], Tensor],
    inputs: Tensor | Iterable[Tensor],
    *,
    held: Tensor | None = None,
    steps: int = 1000,
    batch: int = 1024,
    rate: float = 1e-3,
    gate_rate: float | None = None,
    decay: float = 0.0,
    seed: int = 0,
) -> Distillation:
    """Train a module in place to imitate an MLP: :func:`distill` for one that exists already.

    Args:
        student: a :class:`MixtureOfDecoders`, or any module from inputs (rows, in) to outputs
            (rows, out) with a method ``coefficients`` that returns tensors (rows, N): a
            transcoder whose coefficients are its hidden units, for instance.
        mlp: a module or a function of tensors (rows, in).
        inputs: as for :func:`distill`, in the student's dtype.
        held: as for :func:`distill`, like the following arguments.
        steps: updates.
        batch: rows per step.
        rate: the highest learning rate.
        gate_rate: that of every :class:`tensormoe_torch.ExpertGate` in the student, if another.
        decay: weight decay.
        seed: of batches.

    Returns:
        The report.

    Raises:
        SpecError: as :func:`distill`.

    >>> import torch
    >>> from tensormoe_torch.mxd import MixtureOfDecoders
    >>> block = MixtureOfDecoders(8, experts=64, k=4)
    >>> report = imitate(block, torch.nn.Linear(8, 8), torch.randn(500, 8), steps=50)
    >>> report.experts, report.losses[-1] < report.losses[0]
    (64, True)
    """
    if not isinstance(student, nn.Module) or not callable(getattr(student, "coefficients", None)):
        raise SpecError(
            f"student must be a module with a method coefficients; got {brief(student)}."
        )
    course = Course(steps, batch, rate, decay, seed, gate_rate)
    return train(student, Feed.of(mlp, inputs, course), course, held)


def _known(mlp: object, hidden: int | None, act: Act | None) -> tuple[int, Act]:
    """The block's hidden size and activation."""
    if hidden is not None:
        positive_int(hidden, "hidden_features")
    if hidden is not None and act is not None:
        return hidden, act
    try:
        found = read_block(mlp, "mlp")
    except SpecError as error:
        raise SpecError(
            "hidden_features and act_layer must be given for what is not recognized as an MLP; got "
            f"{hidden} and {brief(act)}. {error}"
        ) from error
    own = found.activation if found.activation is not None else copied(found.act)
    assert own is not None
    return hidden or found.sizes[1], own if act is None else act


def _experts(experts: int | None, transcoder: int | None, hidden: int) -> int:
    if (experts is None) == (transcoder is None):
        raise SpecError(
            f"give experts or the width of a transcoder, one of the two; got {brief(experts)} and "
            f"{brief(transcoder)}."
        )
    if experts is not None:
        return positive_int(experts, "experts")
    width = positive_int(transcoder, "transcoder")
    if width <= hidden:
        raise SpecError(
            f"transcoder must be wider than the block's {hidden} hidden units, so that parameters "
            f"are left for experts; got {width}. A usual width is {8 * hidden}."
        )
    return width - hidden
