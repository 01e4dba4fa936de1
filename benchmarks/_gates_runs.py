"""Training runs of the study of gates, kept in a file as they end."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _gates_candidates import Candidate, Mixture
from _gates_tasks import Task
from torch import Tensor, nn

from tensormoe import CP, select_rank
from tensormoe.factorizations import Factorization, resolve_factorization

__all__ = ["DECAY", "Found", "Runs", "Setting", "build", "parameters", "run"]

Found = dict[str, Any]
DECAY = 0.01


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        task: its name.
        model: "linear", "low rank", "mlp" or the name of a candidate.
        experts: one number per level; empty for models without.
        factorization: of the experts.
        total: whether the gate is inside the linear layer's parameters, rather than on top.
        optimizer: "adamw", "sgd" or "muon".
        rate: highest learning rate.
        decay: weight decay of AdamW.
        seed: of initial values and batches.
        held_out: whether accuracy is that on held-out data.
    """

    task: str
    model: str
    experts: tuple[int, ...] = ()
    factorization: str = ""
    total: bool = False
    optimizer: str = "adamw"
    rate: float = 1e-3
    decay: float = DECAY
    seed: int = 0
    held_out: bool = True

    @property
    def key(self) -> str:
        """The setting as text, equal for equal settings."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)


class Block(nn.Module):
    """A residual block between two linear layers."""

    def __init__(self, task: Task, inner: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(task.features, task.width), nn.Linear(task.width, 26)
        self.before, self.after = nn.LayerNorm(task.width), nn.LayerNorm(task.width)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        logits: Tensor = self.head(self.after(x + self.inner(self.before(x))))
        return logits

    def gate_inputs(self, x: Tensor) -> Tensor:
        inputs: Tensor = self.before(self.stem(x))
        return inputs


def build(task: Task, setting: Setting, candidate: Candidate | None) -> nn.Module:
    """The untrained model of a setting."""
    torch.manual_seed(setting.seed)
    rows = task.width or task.features
    columns = task.width or task.classes
    budget = rows * columns + columns
    if candidate is not None:
        kind = _factorization(setting, rows, columns, budget)
        inner: nn.Module = Mixture(candidate, [(rows, columns, kind)], setting.experts)
    elif setting.model == "linear":
        inner = nn.Linear(rows, columns)
    elif setting.model == "low rank":
        kind = _factorization(setting, rows, columns, budget)
        assert isinstance(kind, CP)
        rank = min(kind.rank, rows, columns)
        inner = nn.Sequential(nn.Linear(rows, rank, bias=False), nn.Linear(rank, columns))
    else:
        hidden = max(1, (budget - columns) // (rows + columns + 1))
        inner = nn.Sequential(nn.Linear(rows, hidden), nn.GELU(), nn.Linear(hidden, columns))
    return Block(task, inner) if task.width else inner


def _factorization(setting: Setting, rows: int, columns: int, budget: int) -> Factorization:
    spent = rows * sum(setting.experts) if setting.total else 0
    kind = setting.factorization
    bonds = (4, 4, None) if kind == "tensor_ring" and len(setting.experts) == 1 else None
    rank = select_rank(
        kind, rows, columns, setting.experts, budget=budget - spent, bonds=bonds, gate=None
    )
    return resolve_factorization(kind, rank)


def parameters(model: nn.Module) -> int:
    """Trainable entries."""
    return sum(each.numel() for each in model.parameters())


def run(task: Task, setting: Setting, candidate: Candidate | None) -> Found:
    """Train one model and measure it."""
    model = build(task, setting, candidate)
    optimizers = _optimizers(model, setting)
    rates = [[group["lr"] for group in each.param_groups] for each in optimizers]
    warm, losses = max(task.steps // 20, 1), []
    found: Found = {"parameters": parameters(model)}
    first: Tensor | None = None
    for step, (inputs, labels) in enumerate(task.batches(setting.seed)):
        model.train()
        rest = (step - warm) / max(task.steps - warm, 1)
        share = (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * rest)
        for optimizer, tops in zip(optimizers, rates, strict=True):
            for group, top in zip(optimizer.param_groups, tops, strict=True):
                group["lr"] = top * share
        loss = F.cross_entropy(model(inputs), labels)
        model.zero_grad(set_to_none=True)
        loss.backward()
        if candidate is not None and step == 0:
            found["gradient_ratio"] = _gradient_ratio(model)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        if candidate is not None and step + 1 in (10, 300):
            chosen = _coefficients(model.eval(), task.held_out[0])[0].argmax(-1)
            if first is None:
                first = chosen
            else:
                found["kept_first"] = float((chosen == first).float().mean())
    found["first_losses"] = max(losses[:20]) / losses[0]
    found["last_loss"] = sum(losses[-20:]) / 20
    inputs, labels = task.held_out if setting.held_out else task.test
    model.eval()
    with torch.no_grad():
        found["accuracy"] = float((model(inputs).argmax(-1) == labels).float().mean())
    if candidate is not None:
        found |= _routing(model, inputs, labels, task.classes)
    return found


def _optimizers(model: nn.Module, setting: Setting) -> list[torch.optim.Optimizer]:
    every = [*model.parameters()]
    if setting.optimizer == "sgd":
        return [torch.optim.SGD(every, lr=setting.rate, momentum=0.9)]
    if setting.optimizer == "adamw":
        return [torch.optim.AdamW(every, lr=setting.rate, weight_decay=setting.decay)]
    matrices = [each for each in every if each.ndim == 2]
    others = [each for each in every if each.ndim != 2]
    return [
        torch.optim.Muon(matrices, lr=setting.rate, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=setting.rate, weight_decay=setting.decay),
    ]


def _mixture(model: nn.Module) -> Mixture:
    mixture = model.inner if isinstance(model, Block) else model
    assert isinstance(mixture, Mixture)
    return mixture


def _gradient_ratio(model: nn.Module) -> float:
    """Norm of the gate's gradient over that of the factors'."""
    mixture = _mixture(model)

    def norm(module: nn.Module) -> float:
        squares = (
            each.grad.square().sum() for each in module.parameters() if each.grad is not None
        )
        return math.sqrt(float(sum(squares)))

    return norm(mixture.projections) / norm(mixture.layers)


@torch.no_grad()
def _coefficients(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    x = model.gate_inputs(inputs) if isinstance(model, Block) else inputs
    return _mixture(model).coefficients(x)


def _routing(model: nn.Module, inputs: Tensor, labels: Tensor, classes: int) -> Found:
    """Use of experts, one entry per level.

    An expert is dead if no input gives it a coefficient above a hundredth of what all would have
    if they were equal. Its polysemanticity is the distance of its distribution over classes (of
    coefficients) from the nearest one-hot distribution, averaged over experts that are alive.
    """
    dead, active, effective, poly = [], [], [], []
    for weights in _coefficients(model, inputs):
        alive = weights.amax(0) > 0.01 / weights.shape[-1]
        dead.append(float((~alive).float().mean()))
        active.append(float((weights > 0).float().sum(-1).mean()))
        effective.append(float((1 / weights.square().sum(-1)).mean()))
        mass = torch.zeros(classes, weights.shape[-1]).index_add(0, labels, weights)[:, alive]
        share = mass / mass.sum(0)
        share = share - F.one_hot(share.argmax(0), classes).T
        poly.append(float(share.norm(dim=0).mean()))
    return {"dead": dead, "active": active, "effective": effective, "polysemanticity": poly}


class Runs:
    """Finished runs, a line each; those that are there already are not run again."""

    def __init__(self, path: Path, task: Callable[[str], Task]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.task = path, task
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.known: dict[str, Found] = dict(map(json.loads, lines))

    def get(self, setting: Setting, candidate: Candidate | None) -> Found:
        """The measurements of a run."""
        key = setting.key
        if key not in self.known:
            self.known[key] = found = run(self.task(setting.task), setting, candidate)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, found], ensure_ascii=False) + "\n")
            shown = (setting.task, setting.model, setting.experts, setting.rate, setting.seed)
            print(*shown, f"{found['accuracy']:.4f}", file=sys.stderr, flush=True)
        return self.known[key]
