"""One MLP of a language model, replaced by what few units per token can say.

    python benchmarks/study_mxd.py
    python benchmarks/study_mxd.py --quick

A small GPT is trained on real text. The third of its four MLPs is then imitated by a transcoder
(K hidden units per token, all others zero), one with a linear layer beside it, and a mixture of
decoders (K experts per token), all with the same number of parameters, loss, inputs, steps and
optimizer. The first and the last are tried again with encoders that start as the MLP's first layer.
Each kind gets the learning rate that is best for it on held-out text at K = 16, of the same three.
Then each takes the MLP's place, and the cross-entropy on the test text tells what it lost; an MLP
that returns zero tells what there is to lose.

Runs are written to ``out/mxd.jsonl`` as they end, and the model to ``out/mxd.pt``; a second call
goes on from there. The text is the King James Bible (Debian's package bible-kjv), else what
Python's ``help()`` shows. The full study takes one and a half hours on one core,
``--quick`` some seconds.

Needs PyTorch, and what ``examples/gpt_on_text.py`` needs, whose model it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _mxd_model import Host, Recipe, Sizes, load_parts, make_host
from torch import Tensor, nn

from tensormoe_torch.mxd import MixtureOfDecoders, imitate

RATES = (0.003, 0.01, 0.03)
TUNED_K, TUNING = 16, 100  # K and seed of the runs that choose a rate


class Transcoder(nn.Module):
    """``y = W₂ top_k(relu(W₁ x + b₁)) + b₂``, and ``W₃ x`` with a skip (Dunefsky et al. 2024).

    Args:
        features: size of inputs and outputs.
        width: hidden units.
        k: the most of them per token.
        skip: whether there is a W₃; it starts at zero, as W₂ does.
    """

    def __init__(self, features: int, width: int, k: int, *, skip: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(features, width), nn.Linear(width, features)
        self.skip = nn.Linear(features, features, bias=False) if skip else None
        self.k = k
        for layer in (self.decoder, self.skip):
            if layer is not None:
                for parameter in layer.parameters():
                    nn.init.zeros_(parameter)

    @torch.no_grad()
    def encode_like(self, mlp: nn.Sequential) -> None:
        """Start as many units as there are in the MLP as these; the others stay."""
        first = mlp[0]
        assert isinstance(first, nn.Linear)
        self.encoder.weight[: first.out_features] = first.weight
        self.encoder.bias[: first.out_features] = first.bias

    def coefficients(self, x: Tensor) -> tuple[Tensor, ...]:
        logits = self.encoder(x).relu()
        kept, places = logits.topk(self.k)
        return (torch.zeros_like(logits).scatter(-1, places, kept),)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(*self.coefficients(x))
        return y if self.skip is None else y + self.skip(x)


@dataclass(frozen=True)
class Kind:
    """Replacement of the MLP: from features, a transcoder's width and K to a module.

    Args:
        name: for people.
        build: from these numbers to a module with fresh values.
        copies: whether its encoder starts as the MLP's first layer, as far as that goes.
    """

    name: str
    build: Callable[[int, int, int], nn.Module]
    copies: bool = False

    def start(self, plan: Plan, k: int, mlp: nn.Sequential) -> nn.Module:
        student: Any = self.build(plan.sizes.channels, plan.width, k)
        if self.copies:
            student.encode_like(mlp)
        return student


def decoders(features: int, width: int, k: int) -> nn.Module:
    return MixtureOfDecoders(features, experts=width - 4 * features, k=k)


def skipping(features: int, width: int, k: int) -> nn.Module:
    # the skip's parameters are those of so many units
    return Transcoder(features, width + -(features**2) // (2 * features + 1), k, skip=True)


KINDS = (
    Kind("transcoder", Transcoder),
    Kind("skip transcoder", skipping),
    Kind("mixture of decoders", decoders),
    Kind("transcoder, MLP's first layer", Transcoder, copies=True),
    Kind("mixture of decoders, MLP's first layer", decoders, copies=True),
)


@dataclass(frozen=True)
class Plan:
    """Sizes of the study.

    Args:
        sizes: of the GPT.
        recipe: of its training.
        layer: the one whose MLP is replaced.
        width: of the transcoder.
        ks: units or experts per token.
        steps: of an imitation.
        batch: tokens per step.
        inputs: tokens to learn from.
        seeds: runs for every K.
        scored: tokens that a cross-entropy is of.
    """

    sizes: Sizes
    recipe: Recipe
    layer: int
    width: int
    ks: tuple[int, ...]
    steps: int
    batch: int
    inputs: int
    seeds: int
    scored: int


FULL = Plan(
    Sizes(depth=4, channels=128, heads=4, context=128),
    Recipe(steps=1400, batch=16, rate=3e-3, scores=1),
    layer=2,
    width=2048,
    ks=(8, 16, 32),
    steps=2000,
    batch=512,
    inputs=800_000,
    seeds=3,
    scored=32_768,
)
QUICK = Plan(
    Sizes(depth=2, channels=32, heads=2, context=32),
    Recipe(steps=20, batch=8, rate=3e-3, scores=1),
    layer=1,
    width=256,
    ks=(4, 16),
    steps=20,
    batch=256,
    inputs=8192,
    seeds=2,
    scored=4096,
)


class Runs:
    """Finished runs, kept in a file, a line each.

    Args:
        path: of the file.
        plan: of the study; runs of another are left alone.
        host: the model.
    """

    def __init__(self, path: Path, plan: Plan, host: Host) -> None:
        self.path, self.plan, self.host = path, plan, host
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.known = {tuple(key): value for key, value in map(json.loads, lines)}

    def get(self, kind: Kind, part: str, k: int, rate: float, seed: int) -> dict[str, float]:
        """Gap, explained variance, L0 and share of dead units of one student."""
        plan = self.plan
        key = (kind.name, repr(plan), part, k, rate, seed)
        if key not in self.known:
            torch.manual_seed(seed)
            student = kind.start(plan, k, self.host.mlp)
            report = imitate(
                student,
                self.host.mlp,
                self.host.inputs,
                held=self.host.held,
                steps=plan.steps,
                batch=plan.batch,
                rate=rate,
                seed=seed,
            )
            self.known[key] = {
                "gap": self.host.loss(part, student) - self.host.loss(part),
                "explained": report.explained_variance,
                "active": report.active,
                "dead": len(report.dead) / report.experts,
                "parameters": report.parameters,
            }
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, self.known[key]]) + "\n")
            print(kind.name, part, k, rate, seed, self.known[key], file=sys.stderr, flush=True)
        return self.known[key]

    def rate(self, kind: Kind) -> float:
        """The best of the rates on held-out text."""
        gaps = {r: self.get(kind, "held", TUNED_K, r, TUNING)["gap"] for r in RATES}
        return min(gaps, key=lambda each: gaps[each])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for runs and model")
    parser.add_argument("--steps", type=int, help="of an imitation")
    words = parser.parse_args()
    torch.set_num_threads(1)
    plan = QUICK if words.quick else FULL
    plan = replace(plan, steps=words.steps or plan.steps)
    words.out.mkdir(parents=True, exist_ok=True)
    path = words.out / ("mxd_quick.pt" if words.quick else "mxd.pt")
    host = make_host(
        load_parts(), plan.sizes, plan.recipe, path, plan.layer, plan.inputs, plan.scored
    )
    runs = Runs(words.out / "mxd.jsonl", plan, host)

    print(f"{host.name}; {plan.steps} steps of {plan.batch} tokens, {plan.seeds} seeds")
    original = host.loss("test")
    print(f"test cross-entropy {original:.4f} nats per piece, without the MLP", end=" ")
    print(f"{host.loss('test', Nothing()) - original:+.4f}\n")
    print(
        "| | parameters | rate | K | gap, nats (lowest – highest) | below transcoder, × |", end=""
    )
    print(" explained variance | active | dead |")
    print("| --- |" + " ---: |" * 8)
    # K at which rates are chosen first, as its row answers the question
    found = {
        (kind.name, k): [runs.get(kind, "test", k, runs.rate(kind), s) for s in range(plan.seeds)]
        for k in sorted(plan.ks, key=lambda k: k != TUNED_K)
        for kind in KINDS
    }
    for k in plan.ks:
        base = mean(run["gap"] for run in found[KINDS[0].name, k])
        for kind in KINDS:
            some = found[kind.name, k]
            gaps = [run["gap"] for run in some]
            mid = {name: mean(run[name] for run in some) for name in some[0]}
            print(
                f"| {kind.name} | {mid['parameters']:,.0f} | {runs.rate(kind):g} | {k} "
                f"| {mid['gap']:.4f} ({min(gaps):.4f} – {max(gaps):.4f}) "
                f"| {base / mid['gap']:.1f} | {mid['explained']:.3f} | {mid['active']:.1f} "
                f"| {mid['dead']:.0%} |"
            )


class Nothing(nn.Module):
    """Zero, in the place of an MLP."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


if __name__ == "__main__":
    main()
