"""Fewer experts by every criterion: what a small Mixtral on real text loses.

    python benchmarks/study_reduction.py
    python benchmarks/study_reduction.py --quick

The models of ``_compression_model.py`` (four layers of 16 experts, top 2) get half or a quarter of
their experts: pruned to those that are chosen most often or have the highest saliency (REAP), or
merged by router logits (M-SMoE) or average outputs (HC-SMoE), with hidden units aligned or as they
are. Two controls: experts pruned at random, and all experts kept as matrices of low rank with as
many parameters, their errors weighted by the inputs' second moments. The choice is by windows of
the training text, and all figures are of the test text: cross-entropy in nats per token above that
of the whole model, the divergence KL(whole ‖ reduced), and how often both find the same token
likeliest. No model is trained afterwards.

Models are kept in ``out/compression``, where those that are missing are trained, a quarter of an
hour each on one core. The rest takes as long; runs are written to ``reduction.jsonl`` there as they
end, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _compression_model import Host, written
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensormoe_torch import compress, reduce_experts
from tensormoe_torch.compression import TextWindows, calibrate, evaluate

Change = Callable[[nn.Module, list[Any], int, int], None]


def reduced(**options: Any) -> Change:
    """Experts merged or pruned."""

    def change(model: nn.Module, batches: list[Any], keep: int, _: int) -> None:
        reduce_experts(model, batches, keep=keep, **options)

    return change


def at_random(model: nn.Module, batches: list[Any], keep: int, seed: int) -> None:
    """Experts pruned at random, in every layer others."""
    generator = torch.Generator().manual_seed(seed)
    held: Any = model
    for layer in held.model.layers:
        count = layer.mlp.gate.num_experts
        chosen = torch.randperm(count, generator=generator)[:keep].sort().values
        for module in (layer.mlp.gate, layer.mlp.experts):
            for each in module.parameters():
                each.data = each.data[chosen]
            module.num_experts = keep
    held.config.num_local_experts = keep


def factorized(model: nn.Module, batches: list[Any], keep: int, seed: int) -> None:
    """Every matrix a product of two, of as many parameters together."""
    held: Any = model
    share = keep / held.config.num_local_experts
    calibration = calibrate(model, batches, per_expert=True)
    compress(model, "low_rank", budget=share, calibration=calibration, seed=seed)


SHARES = (0.5, 0.25)
BATCH = 16
CHANGES: dict[str, Change] = {
    "pruned at random": at_random,
    "pruned by frequency": reduced(how="prune"),
    "pruned by REAP": reduced(how="prune", score="reap"),
    "merged by router logits (M-SMoE)": reduced(),
    "the same, units as they are": reduced(align=False),
    "merged by outputs, units aligned": reduced(groups="outputs"),
    "the same, units as they are (HC-SMoE)": reduced(groups="outputs", align=False),
    "all kept, matrices of low rank": factorized,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for models")
    parser.add_argument("--seeds", type=int, default=3, help="number of models")
    words = parser.parse_args()
    torch.set_num_threads(1)
    host, seeds, folder = Host(), words.seeds, words.out / "compression"
    cut, scored = TextWindows(256, host.context), TextWindows(None, host.context)
    if words.quick:
        host = Host(256, 32, 32, 2, 8, 2, 32, 20, 4)
        seeds, folder = 1, words.out / "compression-quick"
        cut, scored = TextWindows(32, 32), TextWindows(32, 32)
    folders = [host.trained(folder, seed) for seed in range(seeds)]
    texts = written(folder)
    runs = folder / "reduction.jsonl"
    lines = runs.read_text("utf-8").splitlines() if runs.exists() else []
    found = {tuple(key): values for key, values in map(json.loads, lines)}
    keys = [(name, share) for share in SHARES for name in CHANGES]
    for seed, path in enumerate(folders):
        if all((*key, seed) in found for key in keys):
            continue
        whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        train, test = (
            torch.tensor(tokenizer(texts[part].read_text(), verbose=False)["input_ids"])
            for part in ("train", "test")
        )
        # many windows at once, as experts run one after the other
        given, wanted = (
            [*torch.cat(windows).split(BATCH)]
            for windows in (cut.of(train, whole), scored.of(test, whole))
        )
        for name, share in keys:
            key = (name, share, seed)
            if key not in found:
                model = copy.deepcopy(whole)
                CHANGES[name](model, given, int(share * host.experts), seed)
                found[key] = evaluate(whole, model, wanted).to_dict()
                with runs.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, found[key]]) + "\n")
    plain = [found[(*keys[0], seed)] for seed in range(seeds)]
    losses = ", ".join(f"{each['losses'][0]:.3f}" for each in plain)
    tokens = (cut.samples or 0) * host.context
    print(f"{tokens:,} tokens to choose by, {plain[0]['tokens']:,} scored; whole models: {losses}")
    print("\n| experts | kept | loss, mean (range) | divergence | same |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, share in keys:
        every = [found[(name, share, seed)] for seed in range(seeds)]
        gaps = [each["losses"][1] - each["losses"][0] for each in every]
        loss = f"{mean(gaps):+.3f} ({min(gaps):+.3f} to {max(gaps):+.3f})"
        divergence = mean(each["divergence"] for each in every)
        same = mean(each["agreement"] for each in every)
        print(f"| {name} | {share:.0%} | {loss} | {divergence:.3f} | {same:.1%} |")


if __name__ == "__main__":
    main()
