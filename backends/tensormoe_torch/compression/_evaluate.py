"""Predictions of a compressed model next to the original's: losses, agreement, divergence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import exp
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe._format import Cell, align_totals, format_bytes
from tensormoe._html import table_html
from tensormoe._validation import flag
from tensormoe.errors import ShapeError, SpecError
from tensormoe_torch.compression._dense import DenseExperts
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._find import find_experts
from tensormoe_torch.compression._read import read_experts
from tensormoe_torch.compression._samples import Batch, listed, standing_in
from tensormoe_torch.surgery._inputs import evaluating, run_model

# tokens whose probabilities are compared at a time
_BLOCK = 1024


@dataclass(frozen=True)
class LayerEffect:
    """The original model with the experts of one layer compressed, and no others.

    Args:
        name: of the module of experts.
        loss: cross-entropy in nats per token.
        increase: over that of the original model.
    """

    name: str
    loss: float
    increase: float


@dataclass(frozen=True)
class Evaluation:
    """A compressed model next to the original one; ``print`` it for a table.

    Pairs are of the original and of the compressed model.

    Args:
        tokens: that were predicted.
        losses: cross-entropies of the next token, in nats per token.
        agreement: share of tokens for which both find the same one likeliest.
        divergence: mean Kullback–Leibler divergence of the compressed model's predictions from the
            original's, KL(original ‖ compressed), in nats per token.
        divergence_99: the divergence that 99 % of tokens do not exceed.
        tokens_per_second: forward, of all tokens of the batches.
        weight_bytes: of parameters and buffers.
        peak_memory: bytes of the GPU at most, while the model of the pair ran, the other one's
            weights not counted; None on other devices.
        layers: the effect of each layer alone, if asked for.
    """

    tokens: int
    losses: tuple[float, float]
    agreement: float
    divergence: float
    divergence_99: float
    tokens_per_second: tuple[float, float]
    weight_bytes: tuple[int, int]
    peak_memory: tuple[int, int] | None
    layers: tuple[LayerEffect, ...]

    @property
    def perplexities(self) -> tuple[float, float]:
        """Exponentials of the losses."""
        before, after = self.losses
        return exp(before), exp(after)

    def to_dict(self) -> dict[str, Any]:
        """The evaluation in plain values, for JSON."""
        return asdict(self) | {"perplexities": self.perplexities}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """The inverse of :meth:`to_dict`, from JSON as well, which has no tuples."""
        plain = {name: values[name] for name in cls.__dataclass_fields__}
        for name, each in plain.items():
            if isinstance(each, list | tuple):
                plain[name] = tuple(each)
        plain["layers"] = tuple(LayerEffect(**each) for each in plain["layers"])
        return cls(**plain)

    def __str__(self) -> str:
        return "\n".join([*align_totals(self._rows()), "", *self._notes()])

    def _repr_html_(self) -> str:
        return table_html("Evaluation", self._rows(), self._notes())

    def _rows(self) -> list[list[Cell]]:
        pairs = [
            ("loss, nats per token", [f"{each:.4f}" for each in self.losses]),
            ("perplexity", [f"{each:.3f}" for each in self.perplexities]),
            ("tokens per second", [f"{each:,.0f}" for each in self.tokens_per_second]),
            ("weights", [format_bytes(each) for each in self.weight_bytes]),
        ]
        if self.peak_memory is not None:
            pairs.append(("peak memory", [format_bytes(each) for each in self.peak_memory]))
        heads: list[Cell] = ["", "original", "compressed"]
        rows: list[list[Cell]] = [[name, *cells] for name, cells in pairs]
        # the table's last line is set apart
        return [heads, *rows[:1], *rows[2:], rows[1]]

    def _notes(self) -> list[str]:
        notes = [
            f"{self.tokens:,} tokens; both find the same one likeliest for {self.agreement:.2%}",
            f"KL(original ‖ compressed): {self.divergence:.4g} nats per token, 99 % of tokens at "
            f"most {self.divergence_99:.4g}",
        ]
        for each in self.layers:
            notes.append(f"{each.name} compressed alone: loss {each.increase:+.4f}")
        return notes


def evaluate(
    model: nn.Module,
    compressed: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    layers: bool = False,
) -> Evaluation:
    """Compare what two models predict for the next tokens of a text.

    Both run every batch once, and the first one twice, in evaluation mode.

    Args:
        model: the original, a causal language model: of token ids (batch, tokens) it makes logits
            (batch, tokens, vocabulary), or an output that has them as ``logits``.
        compressed: the other one, of the same vocabulary.
        batches: token ids, or mappings with ``input_ids`` (an ``attention_mask`` leaves out
            padding).
        layers: whether to find the effect of each layer of experts alone: the original model with
            the compressed experts of that layer, which runs all batches once more for each.

    Returns:
        The comparison.

    Raises:
        SpecError: models without logits, or of different vocabularies; no tokens to predict;
            experts that can't stand in for one another.
        ShapeError: logits that are not finite.

    >>> class Next(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.table = nn.Embedding(5, 5)
    ...     def forward(self, ids):
    ...         return self.table(ids)
    >>> one = Next()
    >>> found = evaluate(one, one, torch.tensor([[0, 1, 2, 3]]))
    >>> found.tokens, found.agreement, found.divergence
    (3, 1.0, 0.0)
    """
    for each in (model, compressed):
        if not isinstance(each, nn.Module):
            raise SpecError(f"models must be nn.Modules; got {type(each).__name__}.")
    given = [*listed(batches)]
    flag(layers, "layers")
    if not given:
        raise SpecError("batches must hold tokens; got none. Give token ids (batch, tokens).")
    for batch in given:
        token_ids(batch)
    pairs = _Sides(_Side(model), _Side(compressed))
    pairs.warm(given[0])
    compared = _Compared()
    for batch in given:
        compared.add(*pairs.run(batch), batch)
    effects: tuple[LayerEffect, ...] = ()
    if layers:
        effects = tuple(_effects(model, compressed, given, compared.loss(0)))
    return compared.result(pairs, effects)


class _Side:
    """One of the models, with the time and memory that it takes.

    Args:
        model: it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seconds, self.tokens, self.peak = 0.0, 0, 0
        held = [*model.parameters(), *model.buffers()]
        self.nbytes = sum(each.numel() * each.element_size() for each in held)
        self.cuda = next((each.device for each in held if each.is_cuda), None)

    def run(self, batch: Any, counted: bool = True) -> Tensor:
        """Logits (batch, tokens, vocabulary)."""
        before = 0
        if self.cuda is not None:
            torch.cuda.synchronize(self.cuda)
            torch.cuda.reset_peak_memory_stats(self.cuda)
            before = torch.cuda.memory_allocated(self.cuda)
        start = perf_counter()
        logits = logits_of(self.model, batch)
        if self.cuda is not None:
            torch.cuda.synchronize(self.cuda)
            used = torch.cuda.max_memory_allocated(self.cuda) - before
            self.peak = max(self.peak, self.nbytes + used)
        if counted:
            self.seconds += perf_counter() - start
            self.tokens += token_ids(batch).numel()
        return logits


@dataclass(frozen=True, eq=False)
class _Sides:
    """The original and the compressed model."""

    before: _Side
    after: _Side

    def warm(self, batch: Any) -> None:
        """A run that is not timed: the first one pays for what the others find ready."""
        for side in (self.before, self.after):
            side.run(batch, counted=False)

    def run(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits of both."""
        before, after = self.before.run(batch), self.after.run(batch)
        if before.shape != after.shape:
            raise SpecError(
                "models must have one vocabulary; their logits have shapes "
                f"{tuple(before.shape)} and {tuple(after.shape)}."
            )
        return before, after.to(before.device)


class _Compared:
    """Sums over tokens of two models' predictions."""

    def __init__(self) -> None:
        self.sums = [0.0, 0.0]
        self.tokens = self.same = 0
        self.divergences: list[Tensor] = []

    def add(self, before: Tensor, after: Tensor, batch: Any) -> None:
        """Predictions of a batch."""
        labels, wanted = next_tokens(batch, before.device)
        rows = [each[:, :-1].flatten(0, 1)[wanted] for each in (before, after)]
        targets = labels[wanted]
        for first, second, target in zip(*(e.split(_BLOCK) for e in (*rows, targets)), strict=True):
            p, q = (F.log_softmax(each.float(), dim=-1) for each in (first, second))
            for place, each in enumerate((p, q)):
                self.sums[place] += float(F.nll_loss(each, target, reduction="sum"))
            divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0.0)
            self.divergences.append(divergence.cpu())
            self.same += int((p.argmax(-1) == q.argmax(-1)).sum())
            self.tokens += len(target)

    def loss(self, place: int) -> float:
        """Of the original model, or of the compressed one."""
        if not self.tokens:
            raise SpecError(
                "batches must hold tokens to predict; got windows of one token or none. Give "
                "longer ones."
            )
        return self.sums[place] / self.tokens

    def result(self, sides: _Sides, effects: tuple[LayerEffect, ...]) -> Evaluation:
        """The comparison of all tokens."""
        losses = self.loss(0), self.loss(1)
        both = (sides.before, sides.after)
        peaks = tuple(each.peak for each in both)
        divergences = torch.cat(self.divergences).double().sort().values
        # the smallest that so many do not exceed; torch.quantile takes few values
        place = min(-(-99 * len(divergences) // 100), len(divergences)) - 1
        return Evaluation(
            self.tokens,
            losses,
            self.same / self.tokens,
            float(divergences.mean()),
            float(divergences[place]),
            tuple(each.tokens / max(each.seconds, 1e-9) for each in both),  # type: ignore[arg-type]
            (sides.before.nbytes, sides.after.nbytes),
            peaks if all(each.cuda is not None for each in both) else None,  # type: ignore[arg-type]
            effects,
        )


def _effects(
    model: nn.Module, compressed: nn.Module, batches: list[Any], loss: float
) -> Iterator[LayerEffect]:
    """Losses with the compressed experts of one layer each."""
    for name, module in find_experts(model, None).items():
        source = read_experts(module, name)
        with standing_in(source, _counterpart(source, compressed)):
            found, tokens = 0.0, 0
            for batch in batches:
                logits = logits_of(model, batch)
                labels, wanted = next_tokens(batch, logits.device)
                rows = logits[:, :-1].flatten(0, 1)[wanted].float()
                found += float(F.cross_entropy(rows, labels[wanted], reduction="sum"))
                tokens += int(wanted.sum())
        yield LayerEffect(name, found / tokens, found / tokens - loss)


def _counterpart(experts: DenseExperts, compressed: nn.Module) -> Any:
    """The compressed model's experts of a layer.

    Raises:
        SpecError: none, or fewer that the original's router does not know.
    """
    try:
        found = compressed.get_submodule(experts.name)
    except AttributeError:
        raise SpecError(
            f"the compressed model must have experts under the names of the original; it has no "
            f"{experts.name!r}. Leave layers out."
        ) from None
    if isinstance(found, FactorizedExperts):
        if found.groups is None and found.num_experts != experts.count:
            raise SpecError(
                f"compressed experts stand in for as many; {experts.name!r} has {experts.count} of "
                f"them, and {found.num_experts} in the compressed model. Leave layers out."
            )
    elif read_experts(found, experts.name).count != experts.count:
        raise SpecError(
            f"compressed experts stand in for as many; those of {experts.name!r} are pruned. Leave "
            "layers out."
        )
    return found


def logits_of(model: nn.Module, batch: Any) -> Tensor:
    """Predictions of a model, in evaluation mode.

    Raises:
        SpecError: something else than logits.
        ShapeError: they are not finite.
    """
    with evaluating(model):
        found = plain_logits(model, run_model(model, batch))
    if not bool(torch.isfinite(found).all()):
        raise ShapeError(
            f"logits must be finite; {type(model).__name__} gave NaN or infinity. Look at its "
            "weights, or at the dtype."
        )
    return found


def plain_logits(model: nn.Module, output: Any) -> Tensor:
    """Logits (batch, tokens, vocabulary) in the output of a model.

    Raises:
        SpecError: something else.
    """
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.ndim != 3:
        raise SpecError(
            f"models must give logits (batch, tokens, vocabulary); {type(model).__name__} gave "
            f"{type(output).__name__}. Give causal language models."
        )
    return found


def token_ids(batch: Any) -> Tensor:
    """Token ids (batch, tokens).

    Raises:
        SpecError: none.
    """
    found = batch
    if isinstance(batch, Mapping):
        found = batch.get("input_ids")
    elif isinstance(batch, tuple) and batch:
        found = batch[0]
    if not isinstance(found, Tensor) or found.ndim != 2 or found.is_floating_point():
        raise SpecError(
            "batches must be token ids (batch, tokens), or mappings with input_ids; got "
            f"{type(batch).__name__}."
        )
    return found


def next_tokens(batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """The next tokens, flat, and which of them count."""
    ids = token_ids(batch)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    mask = torch.ones_like(ids) if mask is None else mask
    wanted = (mask[:, 1:].bool() & mask[:, :-1].bool()).flatten()
    return ids[:, 1:].flatten().to(device), wanted.to(device)
