"""Ways to share one budget out over the experts of a language model, at equal bytes.

    python benchmarks/study_allocation.py
    python benchmarks/study_allocation.py --quick

A small GPT of four layers whose MLPs are sparse mixtures (top 2 of 8 experts) is trained on real
text. Its experts then become factors with a share of their bytes, which ``allocate`` shares out
over the projections of all layers: equally, by their sizes, or by measured sensitivities, with
each of the three measures. The cross-entropy on the test text tells what each lost. Sensitivities
are measured on text that the model was trained on; the test text is looked at for the table alone.
A rank is a whole number, so that no row spends its budget to the last byte: "equal, ranks rounded
up" has the ranks of equal shares and one more, and so more bytes than any other row.

Runs are written to ``out/allocation.jsonl`` as they end, and models to ``out/allocation-*.pt``; a
second call goes on from there. The text is the King James Bible (Debian's package bible-kjv), else
what Python's ``help()`` shows. The full study takes about half an hour on one core, the models
included, ``--quick`` some seconds.

Needs PyTorch and what ``examples/gpt_on_text.py`` needs, whose model it is.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from _merging_model import Host, loss
from _mxd_model import Parts, load_parts
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from _comparison.text import windows
from gpt_on_text import Sizes

from tensormoe.factorizations import Factorization
from tensormoe.selection import Allocation, allocate
from tensormoe_torch import compress
from tensormoe_torch.allocation import measure_sensitivities

WHOLE = "whole"
_AROUND = (0.3, 0.6, 1.0, 1.6, 2.5)

Share = Callable[[nn.Module, str, float, "list[tuple[Tensor, Tensor]]"], Allocation]


def equal(model: nn.Module, name: str, share: float, _: object) -> Allocation:
    return allocate(model, share, factorization=name)


def rounded_up(model: nn.Module, name: str, share: float, _: object) -> Allocation:
    """Equal shares, every bond between input and output one larger."""
    found = allocate(model, share, factorization=name)
    layers = []
    for layer in found.layers:
        specs = tuple(replace(e, factorization=_larger(e.factorization)) for e in layer.specs)
        layers.append(replace(layer, specs=specs))
    return replace(found, layers=tuple(layers))


def _larger(kind: Factorization) -> Factorization:
    rank = kind.rank
    made: Factorization = kind.with_rank(
        (rank + 1,) if isinstance(rank, int) else (*rank[:-1], rank[-1] + 1)
    )
    return made


def by_size(model: nn.Module, name: str, share: float, _: object) -> Allocation:
    return allocate(model, share, factorization=name, by="size")


def by_measure(measure: str) -> Share:
    def shared(
        model: nn.Module, name: str, share: float, batches: list[tuple[Tensor, Tensor]]
    ) -> Allocation:
        given: Any = [inputs for inputs, _ in batches] if measure == "error" else batches
        found = measure_sensitivities(
            model,
            given,
            factorization=name,
            shares=[share * each for each in _AROUND if share * each <= 1],
            measure=measure,
            loss=None if measure == "error" else cross_entropy,
        )
        return allocate(model, share, factorization=name, sensitivities=found)

    return shared


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())


WAYS: dict[str, Share] = {
    "equal": equal,
    "equal, ranks rounded up": rounded_up,
    "by size": by_size,
    "sensitivity: loss": by_measure("loss"),
    "sensitivity: gradient": by_measure("gradient"),
    "sensitivity: error of outputs": by_measure("error"),
}


@dataclass(frozen=True)
class Plan:
    """Sizes of the study.

    Args:
        host: the model.
        settings: factorizations with shares of the experts' bytes.
        calibration: windows of training text that sensitivities are measured on.
        seeds: models.
        scored: pieces that a cross-entropy is of.
    """

    host: Host
    settings: tuple[tuple[str, float], ...]
    calibration: int
    seeds: int
    scored: int


FULL = Plan(
    Host(Sizes(4, 64, 4, 64, 8), hidden=128, top_k=2, steps=2000, batch=16, rate=3e-3),
    settings=(("cp", 0.5), ("cp", 0.25)),
    calibration=128,
    seeds=3,
    scored=32_768,
)
QUICK = Plan(
    Host(Sizes(2, 32, 2, 32, 4), hidden=32, top_k=2, steps=20, batch=8, rate=3e-3),
    settings=(("cp", 0.25),),
    calibration=8,
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
        self.path, self.plan, self.parts = folder / "allocation.jsonl", plan, parts
        self.name = "allocation-quick" if plan is QUICK else "allocation"
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        self.known: dict[tuple[Any, ...], dict[str, Any]] = {
            tuple(key): value for key, value in map(json.loads, lines)
        }

    def get(self, way: str, name: str, share: float, seed: int) -> dict[str, Any]:
        """Bytes of the experts, cross-entropy, seconds, and ranks by projection."""
        plan = self.plan
        key = (way, name, share, seed, repr((plan.host, plan.calibration, plan.scored)))
        if key not in self.known:
            path = self.path.with_name(f"{self.name}-{seed}.pt")
            model: Any = plan.host.trained(self.parts, seed, path)
            found: dict[str, Any] = {}
            if way != WHOLE:
                start = time.perf_counter()
                shared = WAYS[way](model, name, share, self.batches())
                found["seconds"] = time.perf_counter() - start
                found["ranks"] = [[k.rank for k in each.factorizations] for each in shared.layers]
                model = copy.deepcopy(model)
                compress(model, shared)
            experts = [each for layer in model.layers for each in layer.mlp.experts.parameters()]
            found["bytes"] = sum(each.numel() * each.itemsize for each in experts)
            test = self.parts.test[: plan.scored]
            found["loss"] = loss(model, test, plan.host.sizes.context)
            self.known[key] = found
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, found]) + "\n")
            print(way, name, share, seed, found, file=sys.stderr, flush=True)
        return self.known[key]

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Windows of training text with the pieces that follow."""
        count, size = self.plan.calibration, self.plan.host.batch
        inputs, labels = windows(self.parts.train, self.plan.host.sizes.context)
        places = range(0, count, size)
        return [(inputs[k : k + size], labels[k : k + size]) for k in places]

    def row(self, way: str, name: str, share: float) -> str:
        """A line of the table."""
        seeds = range(self.plan.seeds)
        found = [self.get(way, name, share, seed) for seed in seeds]
        whole = [self.get(WHOLE, "", 1.0, seed) for seed in seeds]
        first = [self.get("equal", name, share, seed) for seed in seeds]
        gaps = [one["loss"] - other["loss"] for one, other in zip(found, whole, strict=True)]
        won = [one["loss"] - other["loss"] for one, other in zip(found, first, strict=True)]
        cells = [
            name,
            way,
            f"{mean(each['bytes'] for each in found) / whole[0]['bytes']:.2%}",
            f"{mean(gaps):+.4f} ({min(gaps):+.4f} – {max(gaps):+.4f})",
            "" if way == "equal" else f"{mean(won):+.4f} ({min(won):+.4f} – {max(won):+.4f})",
            f"{mean(each['seconds'] for each in found):.0f}",
        ]
        return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for runs and models")
    words = parser.parse_args()
    torch.set_num_threads(1)
    plan, parts = QUICK if words.quick else FULL, load_parts()
    words.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(words.out, plan, parts)

    losses = [runs.get(WHOLE, "", 1.0, seed)["loss"] for seed in range(plan.seeds)]
    print(f"{parts.name}: {len(parts.train):,} pieces to train on; {plan.seeds} models")
    print(f"whole: {mean(losses):.4f} ({min(losses):.4f} – {max(losses):.4f}) nats per piece")
    print("\n| factors | shared out | bytes | lost, nats per piece (lowest – highest) ", end="")
    print("| against equal | seconds |\n| --- | --- |" + " ---: |" * 4)
    for name, share in plan.settings:
        for way in WAYS:
            print(runs.row(way, name, share), flush=True)


if __name__ == "__main__":
    main()
