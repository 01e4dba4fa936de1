"""Cross-entropy that distillation wins back for sparse models of which a quarter is left.

    python benchmarks/study_healing.py
    python benchmarks/study_healing.py --quick

Experts of the models of ``_compression_model.py`` become factors of low rank with 25 % of their
entries, by errors of outputs on 64 windows of the training text. They are healed for 5 % of the
steps that the models were trained for, on windows of the same text. The learning rate is the one
with which a quarter of these steps loses least on the text that is held out, of the first model;
the test text tells what is lost before and after, with the parameters rounded to bfloat16, as files
have them.

A run that was killed goes on where it was. Takes an hour on one core, after those that it takes to
train the models; ``--quick`` some seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _compression_model import Host, written
from torch import Tensor

from tensormoe_torch import compress
from tensormoe_torch.compression import (
    Healing,
    TextWindows,
    calibrate,
    evaluate,
    heal,
    load_model,
    load_tokens,
)

SHARE, CALIBRATION, TESTED = 0.25, 64, 128
RATES = (3e-3, 1e-2)
QUICK = Host(pieces=300, hidden=32, intermediate=48, layers=2, experts=4, steps=60, batch=4)


class Subject:
    """A trained model, its compressed copy, and windows of texts.

    Args:
        host: what is trained.
        folder: of models and texts.
        seed: of the model.
    """

    def __init__(self, host: Host, folder: Path, seed: int) -> None:
        self.host, self.seed = host, seed
        path, texts = host.trained(folder, seed), written(folder)
        self.original = load_model(path, dtype="float32")
        ids = {part: load_tokens(text, path, (self.original,)) for part, text in texts.items()}
        cut = TextWindows(None, host.context)
        rows = torch.cat(cut.of(ids["train"], self.original))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        self.batches = [*rows[order].split(host.batch)]
        few = TextWindows(TESTED, host.context, batch=host.batch)
        self.held, self.tested = (few.of(ids[part], self.original) for part in ("held", "test"))
        given = TextWindows(CALIBRATION, host.context, batch=host.batch)
        calibration = calibrate(self.original, given.of(ids["train"], self.original))
        self.compressed = copy.deepcopy(self.original)
        compress(self.compressed, "low_rank", budget=SHARE, calibration=calibration)

    def healed(self, settings: Healing, checkpoint: Path) -> Any:
        """The compressed model, healed."""
        model = copy.deepcopy(self.compressed)
        options = settings.to_dict()
        heal(
            model,
            self.original,
            self.batches,
            **options,
            checkpoint=checkpoint,
            every=25,
            callback=lambda now: (
                print(self.seed, settings.lr, now.done, now.loss, flush=True)
                if now.done % 25 == 0
                else None
            ),
        )
        return model

    def loss(self, model: Any, batches: list[Tensor]) -> tuple[float, float]:
        """Cross-entropies of the original, and of a model as files have it."""
        stored = copy.deepcopy(model).to(torch.bfloat16).float()
        return evaluate(self.original, stored, batches).losses


def best_rate(subject: Subject, out: Path) -> float:
    """The rate with which a quarter of the steps loses least on the held-out text."""
    steps = max(subject.host.steps // 80, 1)
    scores = {rate: run(subject, rate, steps, out)["held"][2] for rate in RATES}
    print("held-out losses by rate:", scores)
    return min(scores, key=lambda each: scores[each])


def run(subject: Subject, rate: float, steps: int, out: Path) -> dict[str, Any]:
    """Losses of a healing, by text; read from a file if it is there."""
    name = f"healing-{subject.host.steps}-{subject.seed}-{rate:g}-{steps}"
    path = out / f"{name}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    state = out / f"{name}.safetensors"
    model = subject.healed(Healing(steps, lr=rate), state)
    found = {}
    for part, batches in (("held", subject.held), ("test", subject.tested)):
        original, before = subject.loss(subject.compressed, batches)
        found[part] = [original, before, subject.loss(model, batches)[1]]
    path.write_text(json.dumps(found))
    state.unlink()
    print(name, found, flush=True)
    return found


def main() -> None:
    """Run the study, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/compression"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, help="leave out the search for one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    host = QUICK if arguments.quick else Host()
    folder = arguments.out / "healing-quick" if arguments.quick else arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    steps = max(host.steps // 20, 1)
    seeds = [0] if arguments.quick else arguments.seeds
    subjects = (Subject(host, folder, seed) for seed in seeds)
    first = next(subjects)
    rate = arguments.rate or best_rate(first, folder)
    rows = [run(each, rate, steps, folder)["test"] for each in chain((first,), subjects)]
    print("| model | original | compressed | healed | won back |")
    print("| --- | ---: | ---: | ---: | ---: |")
    shares = []
    for seed, (original, before, after) in zip(seeds, rows, strict=True):
        shares.append((before - after) / (before - original))
        print(f"| {seed} | {original:.3f} | {before:.3f} | {after:.3f} | {shares[-1]:.0%} |")
    print(f"mean won back: {mean(shares):.1%}")


if __name__ == "__main__":
    main()
