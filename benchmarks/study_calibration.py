"""Effect of weighting by data on a sparse language model whose experts are factorized.

    python benchmarks/study_calibration.py
    python benchmarks/study_calibration.py --quick

The models of ``study_merging.py`` are calibrated on 64 windows of their training text. Experts
become Tucker factors with 30 % of the entries, by errors weighted in different ways, and the test
text tells what each did to their predictions. Takes some ten minutes on one core, after those that
``study_merging.py`` takes to train the models; ``--quick`` some seconds.

Needs what ``study_merging.py`` needs.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch.nn.functional as F
from _mxd_model import load_parts
from study_merging import FULL, QUICK
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from _comparison.text import windows

from tensormoe.decomposition import Search
from tensormoe_torch import compress
from tensormoe_torch.compression import Evaluation, calibrate, evaluate

SHARE = 0.3
SEARCH = Search(starts=1, sweeps=15)
TESTED = 8192
KINDS: dict[str, dict[str, Any]] = {
    "weights": {"weighting": "none"},
    "inputs": {},
    "inputs, experts by frequency": {"expert_weights": "frequency"},
    "inputs, experts by router weights": {"expert_weights": "router"},
    "inputs and outputs": {"weighting": "both"},
    "inputs and gradients": {"weighting": "fisher"},
    "inputs, layer after layer": {"weighted": True, "sequential": True},
}


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of the next pieces, summed."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def run(seed: int, quick: bool, out: Path) -> dict[str, tuple[float, float, Evaluation]]:
    """Errors of weights and outputs, means over projections, and the evaluation, by kind."""
    plan, parts = QUICK if quick else FULL, load_parts()
    name = f"merging-quick-{seed}.pt" if quick else f"merging-{seed}.pt"
    model = plan.host.trained(parts, seed, out / name)
    context = plan.host.sizes.context
    given = windows(parts.train, context)[0][: plan.calibration]
    tested = windows(parts.test[: 512 if quick else TESTED], context)[0].split(32)
    calibration = calibrate(model, [*given.split(32)], loss=loss, per_expert=True)
    found = {}
    for kind, options in KINDS.items():
        mine = copy.deepcopy(model)
        data: Any = {"inputs": given} if "weighted" in options else {"calibration": calibration}
        report = compress(mine, "tucker", budget=SHARE, search=SEARCH, **data, **options)
        reports = [each.report for module in report.modules for each in module.projections]
        outputs = mean(each.output_error or 0.0 for each in reports)
        found[kind] = mean(e.error for e in reports), outputs, evaluate(model, mine, [*tested])
        print(seed, kind, found[kind][2].losses, flush=True)
    return found


def main() -> None:
    """Run the study, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    seeds = range(1 if arguments.quick else 3)
    runs = [run(seed, arguments.quick, arguments.out) for seed in seeds]
    print("| errors weighted by | weights off by | outputs off by | loss | divergence | same |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for kind in KINDS:
        weights, outputs, evaluations = zip(*(each[kind] for each in runs), strict=True)
        increases = [each.losses[1] - each.losses[0] for each in evaluations]
        divergence = mean(each.divergence for each in evaluations)
        same = mean(each.agreement for each in evaluations)
        print(
            f"| {kind} | {mean(weights):.1%} | {mean(outputs):.1%} | {mean(increases):+.3f} "
            f"({min(increases):+.3f} to {max(increases):+.3f}) | {divergence:.3f} | {same:.1%} |"
        )


if __name__ == "__main__":
    main()
