"""A small GPT of sparse mixtures on real text: the subject of study_merging."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from _mxd_model import Parts, score
from torch import Tensor, nn

from tensormoe.gates import load_balance_loss
from tensormoe.routing import Routes
from tensormoe_torch import SparseMoE, parameter_groups

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from _comparison.text import Text, batches
from gpt_on_text import GPT, Sizes

BALANCE = 0.01


@dataclass(frozen=True)
class Host:
    """Sizes of the model, and how it is trained.

    Args:
        sizes: of the GPT.
        hidden: size between the layers of an expert.
        top_k: experts per token.
        steps: of AdamW, with a warm-up over a tenth of them, then a cosine down to zero.
        batch: windows per step.
        rate: the highest learning rate.
    """

    sizes: Sizes
    hidden: int
    top_k: int
    steps: int
    batch: int
    rate: float

    def build(self, pieces: int) -> GPT:
        """A model with fresh values."""
        return GPT(
            self.sizes,
            pieces,
            lambda channels, _, experts: SparseMoE(
                channels, self.hidden, experts=experts, top_k=self.top_k
            ),
        )

    def trained(self, parts: Parts, seed: int, path: Path) -> GPT:
        """A trained model, from a file if it was trained before."""
        torch.manual_seed(seed)
        model = self.build(parts.pieces)
        if path.exists():
            model.load_state_dict(torch.load(path))
        else:
            self.train(model, parts, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            torch.save(model.state_dict(), part)
            part.replace(path)
        return model.eval().requires_grad_(False)

    def train(self, model: GPT, parts: Parts, seed: int) -> None:
        """Train a model in place, with a loss that balances the experts' loads."""
        text = Text(parts.name, parts.train, parts.held, "")
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=self.rate)
        records: list[Routes] = []
        hooks = [
            layer.mlp.router.register_forward_hook(lambda _, __, found: records.append(found))
            for layer in model.layers
        ]
        given = batches(text, self.sizes.context, self.batch, seed)
        warm, losses = max(self.steps // 10, 1), []
        for step, (inputs, labels) in zip(range(self.steps), given, strict=False):
            rest = (step - warm) / max(self.steps - warm, 1)
            share = (step + 1) / warm if step < warm else 0.5 + 0.5 * cos(pi * rest)
            for group in optimizer.param_groups:
                group["lr"] = self.rate * share
            records.clear()
            loss = F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())
            losses.append(loss.item())
            for each in records:
                count = each.logits.shape[-1]
                loss = loss + BALANCE * load_balance_loss(each.scores, each.choices, experts=count)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % 200 == 0:
                print(seed, step + 1, mean(losses[-200:]), file=sys.stderr, flush=True)
        for hook in hooks:
            hook.remove()


def loss(model: nn.Module, ids: Tensor, context: int) -> float:
    """Cross-entropy in nats per piece, over windows side by side."""
    return score(model, ids, context).loss
