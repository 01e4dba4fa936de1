"""Predicted next to true increases of a loss, over ways of compressing a trained sparse model.

    python benchmarks/study_prediction.py
    python benchmarks/study_prediction.py --table out/compression/prediction.json

The models of ``_compression_model.py`` are calibrated on windows of their training text, with
gradients, and with the measured response of the loss to errors of each layer. Then their experts
are factorized in some thirty ways, each from scratch: several factorizations, budgets and
weightings of errors, all layers or one alone. The test text tells the true increase of the
cross-entropy, and Spearman's coefficient how well each figure that is known before ranks the ways.
Every result is kept in a file as soon as it is there; the same command goes on from it. Takes some
minutes per model on one core; models that are not there are trained first.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _compression_model import Host, written
from scipy.stats import spearmanr
from torch import Tensor

from tensormoe import select_rank
from tensormoe.compression import Calibration
from tensormoe.compression._predicted import lost_to_second_order
from tensormoe.decomposition import Search
from tensormoe.factorizations import Factorization, resolve_factorization
from tensormoe_torch import compress
from tensormoe_torch.compression import TextWindows, calibrate, next_token_loss
from tensormoe_torch.compression._text import load_model, load_tokens

SEEDS = (0, 1, 2)
CALIBRATED = TextWindows(128, 256)
TESTED = TextWindows(128, 256)
SEARCH = Search(starts=1, sweeps=15)
KINDS = ("low_rank", "shared_basis", "tucker", "tensor_train")
FIGURES = {
    "weights": "errors of weights, squared and summed",
    "outputs": "errors of outputs, squared and summed",
    "outputs, pooled": "the same, by inputs of all rows",
    "loss": "loss, by all rows' gradients and each expert's inputs",
    "loss, pooled": "loss, by gradients and inputs of all rows",
    "measured": "loss, by the measured response to errors of that size",
}


def ways(layers: list[str]) -> Iterator[tuple[str, str, float, str, str | None]]:
    """Name, factorization, budget, weighting, and a layer if it is one alone."""
    for kind in KINDS:
        for budget in (0.3, 0.5, 0.7):
            yield f"{kind} {budget:.0%}", kind, budget, "inputs", None
    for kind in ("low_rank", "tucker"):
        for weighting in ("none", "both", "fisher"):
            yield f"{kind} 50%, {weighting}", kind, 0.5, weighting, None
    for kind in ("cp", "tensor_ring"):
        yield f"{kind} 50%", kind, 0.5, "inputs", None
    for kind, budget in (("low_rank", 0.5), ("tucker", 0.3)):
        for place, layer in enumerate(layers):
            yield f"{kind} {budget:.0%}, layer {place}", kind, budget, "inputs", layer


def of_size(kind: str, budget: float) -> Factorization:
    """The factorization with the most capacity in a share of the experts' entries."""
    host = Host()
    entries = round(budget * host.experts * host.hidden * host.intermediate)
    sizes = (host.hidden, host.intermediate, host.experts)
    rank = select_rank(kind, *sizes, budget=entries, gate=False, bias=False)
    return resolve_factorization(kind, rank)


@torch.no_grad()
def loss_of(model: Any, batches: list[Tensor]) -> float:
    """Nats per token."""
    total = sum(float(next_token_loss(model(each), each)) for each in batches)
    return total / sum(each.numel() - len(each) for each in batches)


def variants(calibration: Calibration) -> dict[str, Calibration]:
    """The same with less in it."""

    def without(*ends: str) -> Calibration:
        arrays = {k: a for k, a in calibration.arrays.items() if not k.endswith(ends)}
        return replace(calibration, arrays=arrays)

    return {
        "": calibration,
        ", pooled": without(".experts", ".experts.mean"),
    }


def figures(
    model: Any, report: Any, mine: Any, known: Mapping[str, Calibration]
) -> dict[str, float]:
    """Predictions of the loss that a compressed model adds; its experts become dense again."""
    found = dict.fromkeys(FIGURES, 0.0)
    for module in report.modules:
        stacks = stacks_of(model.get_submodule(module.name))
        layers = mine.get_submodule(module.name).projections
        dense = copy.deepcopy(model.get_submodule(module.name))
        for each in module.projections:
            whole, rebuilt = stacks[each.role], layers[each.role].materialize()[0].detach()
            missing = whole - rebuilt
            pairs = [(a.numpy(), b.numpy()) for a, b in zip(whole, missing, strict=True)]
            found["weights"] += each.report.error**2
            for name, calibration in known.items():
                got = lost_to_second_order(calibration, module.name, each.role, pairs)
                increase = got.predicted_loss or 0.0
                found[f"loss{name}"] += increase
                if not name:
                    found["measured"] += calibration.response(module.name, each.role)(increase)
                if f"outputs{name}" in found:
                    found[f"outputs{name}"] += got.output_error**2
            stacks_of(dense)[each.role].copy_(rebuilt)
        # many times as fast as factors, for as small matrices
        mine.set_submodule(module.name, dense)
    return found


def stacks_of(experts: Any) -> dict[str, Tensor]:
    """Weights (experts, in, out) by role; views."""
    gate, up = experts.gate_up_proj.detach().transpose(1, 2).chunk(2, 2)
    return {
        "gate_proj": gate,
        "up_proj": up,
        "down_proj": experts.down_proj.detach().transpose(1, 2),
    }


def run(folder: Path, seed: int, done: dict[str, Any], keep: Callable[[], None]) -> None:
    """Every way that is not done yet."""
    path = Host().trained(folder, seed)
    model = load_model(path, "cpu", "float32")
    texts = written(folder)
    layers = [name for name, each in model.named_modules() if name.endswith("experts")]
    left = [each for each in ways(layers) if each[0] not in done]
    if not left:
        return
    given, tested = (
        windows.of(load_tokens(texts[part], path, (model,)), model)
        for part, windows in (("train", CALIBRATED), ("test", TESTED))
    )
    batches = [torch.cat(given[k : k + 16]) for k in range(0, len(given), 16)]
    calibration = calibrate(model, batches, loss=next_token_loss, measure=True, per_expert=True)
    known = variants(calibration)
    batches = [torch.cat(tested[k : k + 16]) for k in range(0, len(tested), 16)]
    before = loss_of(model, batches)
    for name, kind, budget, weighting, layer in left:
        mine = copy.deepcopy(model)
        options: Any = {"weighting": weighting, "calibration": calibration, "select": layer}
        report = compress(mine, of_size(kind, budget), search=SEARCH, **options)
        predicted = figures(model, report, mine, known)
        increase = loss_of(mine, batches) - before
        done[name] = {"before": before, "true": increase, **predicted}
        keep()
        print(seed, name, {k: round(v, 4) for k, v in done[name].items()}, flush=True)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Spearman's coefficient of each figure."""
    lines = [
        "| predicted by | Spearman, mean (range) | predicted ÷ true, whole models | layers alone |",
        "| --- | ---: | ---: | ---: |",
    ]
    for figure, text in FIGURES.items():
        found = []
        for seed in results.values():
            true = [each["true"] for each in seed.values()]
            found.append(spearmanr(true, [each[figure] for each in seed.values()]).statistic)
        spans = ["", ""]
        if figure.startswith(("loss", "measured")):
            spans = [span(results, figure, alone) for alone in (False, True)]
        lines.append(
            f"| {text} | {mean(found):.3f} ({min(found):.3f} to {max(found):.3f}) | "
            f"{' | '.join(spans)} |"
        )
    return "\n".join(lines)


def span(results: Mapping[str, Mapping[str, Any]], figure: str, alone: bool) -> str:
    """Predicted increases over true ones, 16 % to 84 % of ways: of layers alone, or of models."""
    ratios = sorted(
        way[figure] / way["true"]
        for seed in results.values()
        for key, way in seed.items()
        if ("layer" in key) == alone
    )
    return f"{ratios[round(0.16 * len(ratios))]:.2f} to {ratios[int(0.84 * len(ratios))]:.2f}"


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """True increases against predicted ones, with and without the measured response."""
    from tensormoe.plotting import COLOURS, figure, tidy

    with figure(path, width=8.4, height=3.6, transparent=True) as drawn:
        sides = (("loss", "predicted, nats per token"), ("measured", "by the measured response"))
        for axis, (name, label) in zip(drawn.subplots(1, 2, sharey=True), sides, strict=True):
            for seed, colour in zip(results.values(), COLOURS, strict=False):
                for alone, marker in ((False, "o"), (True, "x")):
                    ways = [way for key, way in seed.items() if ("layer" in key) == alone]
                    x, y = [way[name] for way in ways], [way["true"] for way in ways]
                    axis.plot(x, y, marker, color=colour, markersize=4.5, alpha=0.8)
            axis.set(xscale="log", yscale="log", xlabel=label)
            axis.axline((0.05, 0.05), (1, 1), color="#7b8794", linewidth=1)
            tidy(axis)
        drawn.axes[0].set_ylabel("true increase, nats per token")


def main() -> None:
    """Run the study, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("out/compression"))
    parser.add_argument("--table", type=Path, help="print the table of a file of results")
    parser.add_argument("--plot", type=Path, help="a picture of the results")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    arguments = parser.parse_args()
    path = arguments.table or arguments.folder / "prediction.json"
    results: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def keep() -> None:
        path.write_text(json.dumps(results, indent=1))

    for seed in () if arguments.table else arguments.seeds:
        run(arguments.folder, seed, results.setdefault(str(seed), {}), keep)
    print(table(results))
    if arguments.plot is not None:
        draw(results, arguments.plot)


if __name__ == "__main__":
    main()
