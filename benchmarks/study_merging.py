"""Experts of a sparse language model, merged, pruned or factorized to equally many bytes.

    python benchmarks/study_merging.py
    python benchmarks/study_merging.py --quick

A small GPT whose MLPs are sparse mixtures (top 2 of 8 experts) is trained on real text. Its experts
then become a share of their bytes: pruned (those chosen least), merged (M-SMoE; with equally many
per layer, with numbers allotted over layers, and without alignment of hidden units), merged to more
and then factorized (MC-SMoE), factorized as they are, or truncated one by one (SVDs). The models
with half of the bytes are then trained for as many steps, and so is the whole one, at the rate of
three that is best on held-out text for the first model. The cross-entropy on the test text tells
what each lost, before and after. No variant has more bytes than its share.

Runs are written to ``out/merging.jsonl`` as they end, and models to ``out/merging-*.pt``; a second
call goes on from there. The text is the King James Bible (Debian's package bible-kjv), else what
Python's ``help()`` shows. The full study takes about half an hour on one core, ``--quick`` some
seconds.

Needs PyTorch and SciPy, and what ``examples/gpt_on_text.py`` needs, whose model it is.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _merging_model import Host, loss
from _mxd_model import Parts, load_parts
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from _comparison.text import windows
from gpt_on_text import Sizes

from tensormoe_torch import compress, reduce_experts

WHOLE = "whole"
TUNED = 0.5  # share of runs that choose a rate

Change = Callable[[nn.Module, Tensor, "Plan", float], None]


class LowRankExperts(nn.Module):
    """Gated experts, each of whose matrices is a product of two (a truncated SVD at first)."""

    def __init__(self, experts: Any, share: float) -> None:
        super().__init__()
        self.factors = nn.ParameterDict()
        self.act = experts.act_fn
        for role in ("gate_up_proj", "down_proj"):
            weight = experts.projections[role].factors["weight"].detach()
            _, rows, columns = weight.shape
            rank = max(1, int(share * rows * columns / (rows + columns)))
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            roots = values[:, :rank].sqrt()
            self.factors[f"{role}_left"] = nn.Parameter(left[..., :rank] * roots[:, None])
            self.factors[f"{role}_right"] = nn.Parameter(roots[..., None] * right[:, :rank])

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for n in range(len(self.factors["down_proj_left"])):
            token, place = torch.where(index == n)
            units = self.act(self._project("gate_up_proj", n, x[token]))
            made = self._project("down_proj", n, units) * weights[token, place, None]
            y = y.index_add(0, token, made.to(y.dtype))
        return y

    def _project(self, role: str, n: int, rows: Tensor) -> Tensor:
        return rows @ self.factors[f"{role}_left"][n] @ self.factors[f"{role}_right"][n]


def nothing(model: nn.Module, inputs: Tensor, plan: Plan, share: float) -> None:
    """The model as it is."""


def pruned(model: nn.Module, inputs: Tensor, plan: Plan, share: float) -> None:
    reduce_experts(model, inputs, keep=plan.count(share), how="prune")


def merged(model: nn.Module, inputs: Tensor, plan: Plan, share: float) -> None:
    reduce_experts(model, inputs, keep=plan.count(share))


def merged_over_layers(model: nn.Module, inputs: Tensor, plan: Plan, share: float) -> None:
    reduce_experts(model, inputs, keep=share)


def merged_as_they_are(model: nn.Module, inputs: Tensor, plan: Plan, share: float) -> None:
    reduce_experts(model, inputs, keep=plan.count(share), align=False)


def factorized(name: str, *, weighted: bool = False, first: bool = False) -> Change:
    """Factors of the experts, of merged ones with ``first``."""

    def change(model: nn.Module, inputs: Tensor, plan: Plan, share: float) -> None:
        if first:
            # half way, in bytes
            count = plan.count((1.0 + share) / 2.0)
            reduce_experts(model, inputs, keep=count)
            share = share * plan.host.sizes.experts / count
        compress(model, name, budget=share, inputs=inputs, weighted=weighted)

    return change


def truncated(model: nn.Module, inputs: Tensor, plan: Plan, share: float) -> None:
    held: Any = model
    for layer in held.layers:
        layer.mlp.experts = LowRankExperts(layer.mlp.experts, share)


KINDS: dict[str, Change] = {
    "pruned": pruned,
    "merged": merged,
    "merged, numbers allotted over layers": merged_over_layers,
    "merged, units in their order": merged_as_they_are,
    "merged, then CP": factorized("cp", first=True),
    "merged, then Tucker": factorized("tucker", first=True),
    "CP": factorized("cp"),
    "CP, weighted": factorized("cp", weighted=True),
    "Tucker": factorized("tucker"),
    "tensor ring": factorized("tensor_ring"),
    "an SVD per matrix": truncated,
}


@dataclass(frozen=True)
class Plan:
    """Sizes of the study.

    Args:
        host: the model.
        shares: of the experts' bytes.
        calibration: windows of training text that the model runs.
        recovery: steps of training afterwards.
        rates: the highest learning rates to choose from.
        seeds: models.
        scored: pieces that a cross-entropy is of.
    """

    host: Host
    shares: tuple[float, ...]
    calibration: int
    recovery: int
    rates: tuple[float, ...]
    seeds: int
    scored: int

    def count(self, share: float) -> int:
        return int(share * self.host.sizes.experts)


FULL = Plan(
    Host(Sizes(2, 64, 4, 64, 8), hidden=128, top_k=2, steps=2000, batch=16, rate=3e-3),
    shares=(0.5, 0.25),
    calibration=64,
    recovery=200,
    rates=(3e-4, 1e-3, 3e-3),
    seeds=3,
    scored=32_768,
)
QUICK = Plan(
    Host(Sizes(1, 32, 2, 32, 4), hidden=32, top_k=2, steps=20, batch=8, rate=3e-3),
    shares=(TUNED,),
    calibration=8,
    recovery=5,
    rates=(3e-4, 1e-3, 3e-3),
    seeds=1,
    scored=4096,
)


class Runs:
    """Finished runs, kept in a file, a line each.

    Args:
        folder: of the file and the models.
        plan: of the study; runs of another are left alone.
        parts: the text.
    """

    def __init__(self, folder: Path, plan: Plan, parts: Parts) -> None:
        self.path, self.plan, self.parts = folder / "merging.jsonl", plan, parts
        self.name = "merging-quick" if plan is QUICK else "merging"
        self.last: tuple[Any, nn.Module] | None = None
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        self.known = {tuple(key): value for key, value in map(json.loads, lines)}

    def get(
        self, kind: str, share: float, seed: int, rate: float | None = None
    ) -> dict[str, float]:
        """Bytes of the experts and cross-entropy; with a rate, cross-entropies after recovery."""
        plan, parts = self.plan, self.parts
        sizes = repr((plan.host, plan.calibration, plan.recovery, plan.scored))
        key = (kind, share, seed, rate, sizes)
        if key not in self.known:
            model: Any = self.changed(kind, share, seed)
            texts = {"test": parts.test[: plan.scored], "held": parts.held[: plan.scored]}
            context = plan.host.sizes.context
            if rate is None:
                experts = [
                    each for layer in model.layers for each in layer.mlp.experts.parameters()
                ]
                size = sum(each.numel() * each.itemsize for each in experts)
                found = {"bytes": size, "loss": loss(model, texts["test"], context)}
            else:
                model.requires_grad_(True).train()
                recipe = replace(plan.host, steps=plan.recovery, rate=rate)
                recipe.train(model, parts, seed=1000 + seed)
                model.eval()
                found = {name: loss(model, ids, context) for name, ids in texts.items()}
            self.known[key] = found
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, found]) + "\n")
            print(kind, share, seed, rate, found, file=sys.stderr, flush=True)
        return self.known[key]

    def changed(self, kind: str, share: float, seed: int) -> nn.Module:
        """The trained model with other experts."""
        plan, key = self.plan, (kind, share, seed)
        if self.last is None or self.last[0] != key:
            path = self.path.with_name(f"{self.name}-{seed}.pt")
            model = plan.host.trained(self.parts, seed, path)
            given = windows(self.parts.train, plan.host.sizes.context)[0][: plan.calibration]
            torch.manual_seed(seed)
            KINDS.get(kind, nothing)(model, given, plan, share)
            self.last = key, model
        return copy.deepcopy(self.last[1])

    def rate(self, kind: str) -> float:
        """The best rate of recovery on held-out text."""
        share = 1.0 if kind == WHOLE else TUNED
        return min(self.plan.rates, key=lambda rate: self.get(kind, share, 0, rate)["held"])

    def losses(self, kind: str, share: float, *, recovered: bool) -> list[float]:
        """Test cross-entropies of all models."""
        seeds = range(self.plan.seeds)
        if not recovered:
            return [self.get(kind, share, seed)["loss"] for seed in seeds]
        rate = self.rate(kind)
        return [self.get(kind, share, seed, rate)["test"] for seed in seeds]

    def row(self, kind: str, share: float) -> str:
        """A line of the table."""
        size, whole = (self.get(k, s, 0)["bytes"] for k, s in ((kind, share), (WHOLE, 1.0)))
        cells = [kind, f"{size / whole:.1%}", f"{size:,}"]
        for recovered in (False, True):
            if recovered and share != TUNED:
                cells.append("")
                continue
            found = self.losses(kind, share, recovered=recovered)
            plain = self.losses(WHOLE, 1.0, recovered=recovered)
            gaps = [one - other for one, other in zip(found, plain, strict=True)]
            cells.append(f"{mean(gaps):+.3f} ({min(gaps):+.3f} – {max(gaps):+.3f})")
        rate = f"{self.rate(kind):g}" if share == TUNED else ""
        return f"| {' | '.join([*cells, rate])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for runs and models")
    words = parser.parse_args()
    torch.set_num_threads(1)
    plan, parts = QUICK if words.quick else FULL, load_parts()
    words.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(words.out, plan, parts)

    print(f"{parts.name}: {len(parts.train):,} pieces to train on; {plan.seeds} models")
    for recovered in (False, True):
        losses = runs.losses(WHOLE, 1.0, recovered=recovered)
        when = f"after {plan.recovery} more steps" if recovered else "as it is"
        print(f"whole, {when}: {mean(losses):.4f} ({min(losses):.4f} – {max(losses):.4f})")
    print("\n| experts | share | bytes | lost, nats per piece (lowest – highest) ", end="")
    print(f"| lost after {plan.recovery} steps | rate |\n| --- |" + " ---: |" * 5)
    for share in plan.shares:
        for kind in KINDS:
            print(runs.row(kind, share), flush=True)


if __name__ == "__main__":
    main()
