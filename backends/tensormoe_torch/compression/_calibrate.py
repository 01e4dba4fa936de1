"""Calibration of a model: second moments of what its experts get and give, gathered in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe._format import format_bytes
from tensormoe._validation import choice, flag, positive_int
from tensormoe.compression import Calibration
from tensormoe.compression._calibration_arrays import checked_ridge
from tensormoe.compression._identity import shapes_digest
from tensormoe.decomposition._moments import RIDGE
from tensormoe.errors import PlanError, SpecError
from tensormoe_torch.compression._dense import DenseExperts
from tensormoe_torch.compression._find import find_experts
from tensormoe_torch.compression._gather import Kept, Sums
from tensormoe_torch.compression._read import read_experts
from tensormoe_torch.compression._respond import check_measurable, measured_runs, with_responses
from tensormoe_torch.compression._samples import Batch, Samples, listed, watched
from tensormoe_torch.surgery._inputs import evaluating, run_model
from tensormoe_torch.surgery._select import Select

Loss = Callable[[Any, Any], Tensor]
"""A loss, summed over tokens, of a model's output and the batch."""


def calibrate(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    select: Select | None = None,
    outputs: bool = True,
    per_expert: bool = False,
    loss: Loss | None = None,
    measure: bool = False,
    ridge: float | None = None,
    dtype: str = "float32",
    max_memory: int | None = None,
    identity: Mapping[str, str] | None = None,
    callback: Callable[[int], None] | None = None,
) -> Calibration:
    """Second moments of what the experts of a model get and give on data.

    The model runs each batch once, in evaluation mode, and is as it was afterwards. Nothing is kept
    of a batch but sums, in float64 beside the weights; :func:`calibration_memory` says beforehand
    how large they are.

    Args:
        model: it holds experts that :func:`compress` finds.
        batches: as ``inputs`` of :func:`compress`. All tokens count, so there must be no padding.
        select: which experts, as of :func:`compress`.
        outputs: whether second moments of outputs are gathered, for ``weighting="both"``.
        per_expert: whether moments of each expert are gathered as well. Errors of outputs that are
            predicted are exact then, and the file is N times as large.
        loss: a function of the model's output and the batch that gives a loss summed over tokens;
            with it second moments of its gradients with respect to outputs are gathered, for
            ``weighting="fisher"``.
        measure: whether the loss's response to errors of each layer is measured as well, by which
            predictions of the loss hold for early layers and large errors too. Some batches, of
            16,384 tokens or as many as there are, run six times more for each layer, with inputs on
            some of their directions alone; no weight is touched. Needs a loss.
        ridge: share of the mean second moment that is added to all when errors are weighted. By
            default 1e-3, and too few rows for moments of full rank are an error: every layer needs
            as many tokens as its experts have inputs, and as many rows (tokens times experts per
            token) as they have hidden units. With a ridge that is given, fewer are taken.
        dtype: of moments in memory and on disk: ``"float32"`` or ``"float64"``.
        max_memory: bytes that the sums may take. Where those of all layers do not fit, the model
            runs all batches once more for every further part of the layers.
        identity: digests of the model on disk, which are kept as well.
        callback: called with the number of batches that are done, those of all runs.

    Returns:
        The calibration, for :func:`compress`, ``tensormoe compress`` and ``save``.

    Raises:
        SpecError: no experts, no batches, batches with padding, experts that get no tokens, too few
            of them, or a loss that gives no gradients; nothing to measure, or experts that are
            called one by one, of which no loss is predicted.
        ShapeError: NaN or infinity in what experts get or give; the message names the layer.
        PlanError: ``max_memory`` is too little for one layer; nothing ran then.

    >>> class Expert(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up_proj, self.down_proj = nn.Linear(3, 4), nn.Linear(4, 3)
    ...         self.act = nn.ReLU()
    ...     def forward(self, x):
    ...         return self.down_proj(self.act(self.up_proj(x)))
    >>> class Both(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.experts = nn.ModuleList(Expert() for _ in range(2))
    ...     def forward(self, x):
    ...         return sum(expert(x) for expert in self.experts)
    >>> found = calibrate(Both(), torch.randn(40, 3))
    >>> found.roles("experts"), found.arrays["experts.inputs"].shape
    (('up_proj', 'down_proj'), (3, 3))
    """
    sources = _sources(model, select)
    kept = Kept(flag(outputs, "outputs"), flag(per_expert, "per_expert"), loss is not None)
    checked = checked_options(ridge, dtype)
    if flag(measure, "measure"):
        check_measurable(sources, loss)
    parts = calibration_parts(sources, kept, max_memory)
    given = listed(batches)
    if len(parts) > 1 or measure:
        # each part takes a run
        given = [*given]
    arrays: dict[str, Any] = {}
    tokens: dict[str, int] = {}
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        if callback is not None:
            callback(done)

    for part in parts:
        sums = [Sums(each, kept) for each in part]
        run = _Run(model, sums, loss)
        for batch in given:
            _check_whole(batch)
            run(batch)
            tell()
        for each in sums:
            _check_rows(each, ridge)
            found = each.finished(dtype)
            arrays |= {f"{each.experts.name}.{name}": array for name, array in found}
            tokens[each.experts.name] = each.tokens
            # sums of one layer are there beside its means
            each.arrays.clear()
    about = {**(identity or {}), **module_identity(model)}
    calibration = Calibration(arrays, tokens, about, checked)
    if loss is None or not measure:
        return calibration
    return with_responses(calibration, model, sources, [*given], loss, tell)


def calibration_parts(
    sources: Sequence[DenseExperts], kept: Kept, max_memory: int | None
) -> list[list[DenseExperts]]:
    """Layers whose sums fit in memory together, in the model's order.

    Raises:
        PlanError: those of one layer do not.
    """
    parts: list[list[DenseExperts]] = [[]]
    held = 0
    for each in sources:
        needed = kept.nbytes(each)
        if max_memory is not None and needed > positive_int(max_memory, "max_memory"):
            raise PlanError(
                f"sums of each layer must fit in max_memory; those of {each.name!r} take "
                f"{format_bytes(needed)}, and max_memory is {format_bytes(max_memory)}. Leave out "
                "outputs or moments per expert."
            )
        if max_memory is not None and parts[-1] and held + needed > max_memory:
            parts.append([])
            held = 0
        parts[-1].append(each)
        held += needed
    return parts


def calibration_memory(
    model: nn.Module,
    *,
    select: Select | None = None,
    outputs: bool = True,
    per_expert: bool = False,
    gradients: bool = False,
    max_memory: int | None = None,
) -> int:
    """Bytes of the sums of a calibration at a time, in float64; nothing runs.

    Args:
        model: it holds experts.
        select: which experts.
        outputs: as of :func:`calibrate`.
        per_expert: as of :func:`calibrate`.
        gradients: whether a loss is given.
        max_memory: as of :func:`calibrate`.

    Raises:
        SpecError: no experts.
        PlanError: ``max_memory`` is too little for one layer.
    """
    kept = Kept(outputs, per_expert, gradients)
    parts = calibration_parts(_sources(model, select), kept, max_memory)
    return max(sum(kept.nbytes(each) for each in part) for part in parts)


def calibration_runs(
    model: nn.Module,
    kept: Kept,
    max_memory: int | None,
    *,
    measure: bool,
    batches: int,
    tokens: int,
) -> int:
    """Batches that a model runs for a calibration of all of its layers.

    Args:
        model: it.
        kept: what is gathered.
        max_memory: as of :func:`calibrate`.
        measure: the same.
        batches: number of them.
        tokens: of all of them.
    """
    sources = _sources(model, None)
    runs = batches * len(calibration_parts(sources, kept, max_memory))
    return runs + (measured_runs(len(sources), batches, tokens) if measure else 0)


def checked_options(ridge: float | None, dtype: str) -> float:
    """The ridge that is meant.

    Raises:
        SpecError: a ridge or dtype that cannot be.
    """
    choice(dtype, ("float32", "float64"), "dtype", SpecError)
    return RIDGE if ridge is None else checked_ridge(ridge)


def needed_tokens(model: nn.Module) -> int:
    """Tokens without which moments of a model's experts are not of full rank.

    Raises:
        SpecError: no experts.
    """
    config = getattr(model, "config", None)
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    wanted = 0
    for each in _sources(model, None):
        for role, stack in each.stacks.items():
            rows = stack.sizes[0]
            wanted = max(wanted, -(-rows // chosen) if role == "down_proj" else rows)
    return wanted


def module_identity(model: nn.Module) -> dict[str, str]:
    """The digest of a model in memory: names and shapes of its parameters."""
    shapes = ((name, tuple(each.shape)) for name, each in model.named_parameters())
    return {"module": shapes_digest(shapes)}


def _sources(model: nn.Module, select: Select | None) -> list[DenseExperts]:
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be an nn.Module; got {type(model).__name__}.")
    chosen = find_experts(model, select)
    # a module that is used in several places counts once
    names = {id(module): name for name, module in reversed(chosen.items())}
    return [read_experts(chosen[name], name) for name in reversed(names.values())]


@dataclass(frozen=True, eq=False)
class _Run:
    """A run of the model on one batch, which adds to the sums.

    Args:
        model: it runs.
        sums: of every layer.
        loss: whose gradients are summed, if any.
    """

    model: nn.Module
    sums: Sequence[Sums]
    loss: Loss | None

    def __call__(self, batch: Any) -> None:
        experts = [each.experts for each in self.sums]

        def take(place: int, samples: Samples) -> None:
            self.sums[place].add(samples)

        if self.loss is None:
            with evaluating(self.model), watched(experts, take):
                run_model(self.model, batch)
            return

        def gradients(place: int, samples: Samples, found: Tensor) -> None:
            self.sums[place].add_gradients(samples, found)

        with (
            evaluating(self.model),
            _frozen(self.model),
            watched(experts, take, gradients),
            torch.enable_grad(),
        ):
            value = self.loss(run_model(self.model, batch), batch)
            if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
                raise SpecError(
                    "loss must give one number that depends on the model's output; got "
                    f"{type(value).__name__}. Give for example a sum of cross-entropies."
                )
            value.backward()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters without gradients meanwhile."""
    were = [(each, each.requires_grad) for each in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, value in were:
            parameter.requires_grad_(value)


def _check_whole(batch: Any) -> None:
    """Refuse batches with padding, which would count as tokens.

    Raises:
        SpecError: an attention mask with zeros.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and not bool(mask.bool().all()):
        raise SpecError(
            "batches must have no padding, which would count as tokens; got an attention_mask "
            "with zeros. Cut the text into windows of one length."
        )


def _check_rows(sums: Sums, ridge: float | None) -> None:
    """Refuse too few rows for moments of full rank, unless a ridge is given.

    Raises:
        SpecError: no rows, or too few.
    """
    experts, tokens = sums.experts, sums.tokens
    if not tokens:
        raise SpecError(
            f"batches must give all selected experts tokens; those of {experts.name!r} got none. "
            "Give more batches, or select other experts."
        )
    if ridge is not None:
        return
    rows = int(sums.arrays["counts"].sum())
    features = {role: stack.sizes[0] for role, stack in experts.stacks.items()}
    hidden = features.pop("down_proj")
    wanted = max(features.values(), default=0)
    if tokens < wanted or rows < hidden:
        enough = max(wanted, -(-hidden * tokens // rows))
        raise SpecError(
            f"second moments need at least as many tokens as inputs and as many rows as hidden "
            f"units, {wanted:,} and {hidden:,} in {experts.name!r}; got {tokens:,} and {rows:,}. "
            f"Give at least {enough:,} tokens, or a ridge of your own such as ridge=0.01."
        )
