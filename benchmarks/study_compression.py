"""Compressions of a sparse language model and their controls, at equal bytes, in loss.

    python benchmarks/study_compression.py
    python benchmarks/study_compression.py --quick

Three Mixtrals of 4 layers with 16 experts each are trained on real text and stored in bfloat16, as
``tensormoe compress`` finds them. Each is calibrated on 128 windows of its training text, and its
experts are compressed to half and to a quarter of their bytes in every way that ``KINDS`` and
``GATE_UP`` have, with the loss's response to errors measured (``--measure``) and without where that
decides anything; the test text tells what that did to predictions. Results are kept, and the same
command goes on. Takes two hours on one core; ``--quick`` a minute or two.

Needs ``pip install 'tensormoe[huggingface]'`` and, for its text, Debian's package bible-kjv.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _compression_model import Host, written

import tensormoe_torch.huggingface  # noqa: F401
from tensormoe.compression import Compression, compress_checkpoint
from tensormoe_torch.compression import TextWindows, calibrate_checkpoint, evaluate_checkpoints

BUDGETS = (0.5, 0.25)
ALL = ("low_rank", "shared_basis", "tucker")
_CALIBRATED = {"calibration": "plain"}
_MEASURED = {"calibration": "measured"}
KINDS: dict[str, dict[str, Any]] = {
    "SVD of each expert": {"factorization": "low_rank"},
    "whitened SVD of each expert": {"factorization": "low_rank", **_CALIBRATED},
    "joint whitened SVD": {"factorization": "shared_basis", **_CALIBRATED},
    "Tucker, whitened": {"factorization": "tucker", **_CALIBRATED},
    "auto": {"factorization": ALL, **_CALIBRATED},
    "auto, shared by sensitivity": {"factorization": ALL, "share": "sensitivity", **_CALIBRATED},
    "whitened SVD, 8 bits": {"factorization": "low_rank", "bits": 8, **_CALIBRATED},
    "whitened SVD, 4 bits": {"factorization": "low_rank", "bits": 4, **_CALIBRATED},
    "auto, bits too": {"factorization": ALL, "bits": "auto", **_CALIBRATED},
    "auto, bits too, by sensitivity": {
        "factorization": ALL,
        "bits": "auto",
        "share": "sensitivity",
        **_CALIBRATED,
    },
    "auto, by sensitivity, measured": {
        "factorization": ALL,
        "share": "sensitivity",
        **_MEASURED,
    },
    "auto, bits too, measured": {"factorization": ALL, "bits": "auto", **_MEASURED},
    "auto, bits too, by sensitivity, measured": {
        "factorization": ALL,
        "bits": "auto",
        "share": "sensitivity",
        **_MEASURED,
    },
}
_JOINED = {"gate_up": "joined", **_CALIBRATED}
GATE_UP: dict[str, dict[str, Any]] = {
    "whitened SVD of each expert, gate and up as one": {"factorization": "low_rank", **_JOINED},
    "joint whitened SVD, gate and up as one": {"factorization": "shared_basis", **_JOINED},
    "auto, gate and up as one": {"factorization": ALL, **_JOINED},
    "auto, gate and up as loses less": {
        "factorization": ALL,
        "gate_up": "auto",
        **_CALIBRATED,
    },
    "auto, gate and up as one, by sensitivity, measured": {
        "factorization": ALL,
        "gate_up": "joined",
        "share": "sensitivity",
        **_MEASURED,
    },
    "auto, bits too, gate and up as one, by sensitivity, measured": {
        "factorization": ALL,
        "bits": "auto",
        "gate_up": "joined",
        "share": "sensitivity",
        **_MEASURED,
    },
}
"""Gate and up projection as one tensor; in all other rows they are two, as files have them."""
ROUNDED = {"rounded to 8 bits": 8, "rounded to 4 bits": 4}
"""Of the experts themselves: their bytes are what they are."""


class Runs:
    """Results by model, kind and budget, in a file."""

    def __init__(self, folder: Path, host: Host, tested: int) -> None:
        self._folder, self._host, self._tested = folder, host, tested
        self._path = folder / "results.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self._known = {each["key"]: each for each in map(json.loads, lines)}

    @cache  # noqa: B019
    def calibration(self, seed: int, measure: bool) -> Path:
        """The calibration of a model, with or without the measured response of its loss."""
        name = "measured" if measure else "calibration"
        path = self._folder / f"{name}-{seed}.safetensors"
        if not path.exists():
            found = calibrate_checkpoint(
                self._host.trained(self._folder, seed),
                written(self._folder)["train"],
                windows=TextWindows(128, self._host.context, batch=16),
                per_expert=True,
                fisher=True,
                measure=measure,
                dtype="float32",
            )
            found.save(path)
        return path

    def result(self, seed: int, name: str, wanted: Compression) -> dict[str, Any]:
        """Bytes and losses of one compression."""
        key = f"{seed} {name} {wanted.budget}"
        if key not in self._known:
            model, out = self._host.trained(self._folder, seed), self._folder / "compressed"
            shutil.rmtree(out, ignore_errors=True)
            result = compress_checkpoint(model, out, wanted)
            found = evaluate_checkpoints(
                model,
                out,
                written(self._folder)["test"],
                windows=TextWindows(self._tested, self._host.context),
                dtype="float32",
            )
            values = {
                "share": result.nbytes / result.dense_bytes,
                "predicted": result.predicted_loss,
                "losses": found.losses,
                "divergence": found.divergence,
                "same": found.agreement,
                "kinds": sorted({f"{e.factorization} {e.bits or 16}" for e in result.groups}),
            }
            shutil.rmtree(out)
            self._known[key] = {"key": key, **values}
            with self._path.open("a") as file:
                file.write(json.dumps(self._known[key]) + "\n")
            print(key, values, file=sys.stderr, flush=True)
        return self._known[key]

    def settings(self, seed: int, budget: float, options: dict[str, Any]) -> Compression:
        """A compression; with a calibration if it wants one."""
        found = dict(options)
        if kind := found.pop("calibration", None):
            found["calibration"] = str(self.calibration(seed, kind == "measured"))
        return Compression(**found, budget=budget, compare=False)


def rows(runs: Runs, seeds: int) -> Iterator[str]:
    """The table's lines."""
    for name, bits in ROUNDED.items():
        wanted = Compression("dense", bits=bits, compare=False)
        yield line(name, "", [runs.result(seed, name, wanted) for seed in range(seeds)])
    for budget in BUDGETS:
        for name, options in (KINDS | GATE_UP).items():
            found = [
                runs.result(seed, name, runs.settings(seed, budget, options))
                for seed in range(seeds)
            ]
            yield line(name, f"{budget:.0%}", found)


def line(name: str, budget: str, found: list[dict[str, Any]]) -> str:
    """One line: means over the models, and the spread of what was lost."""
    lost = [each["losses"][1] - each["losses"][0] for each in found]
    share, same = (mean(each[key] for each in found) for key in ("share", "same"))
    kinds = ", ".join(sorted({kind for each in found for kind in each["kinds"]}))
    return (
        f"| {name} | {budget} | {share:.1%} | {mean(lost):+.4f} ({min(lost):+.4f} to "
        f"{max(lost):+.4f}) | {same:.1%} | {kinds} |"
    )


def main() -> None:
    """Run the study, and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small model, few steps")
    parser.add_argument("--out", type=Path, default=Path("out/compression"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    host, folder, seeds, tested = Host(), arguments.out, 3, 128
    if arguments.quick:
        host = replace(host, hidden=32, intermediate=48, layers=2, experts=4, context=64, steps=30)
        folder, seeds, tested = folder / "quick", 1, 16
    print("| experts as | budget | bytes | lost, nats per token | same | stored as |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for each in rows(Runs(folder, host, tested), seeds):
        print(each, flush=True)


if __name__ == "__main__":
    main()
