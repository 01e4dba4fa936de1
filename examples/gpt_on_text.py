"""A small GPT whose MLPs are experts, on real text, next to the dense one of the same size.

    python examples/gpt_on_text.py
    python examples/gpt_on_text.py --tokens words
    python examples/gpt_on_text.py --quick

It reads and predicts single characters, or words. Every MLP becomes a ``MuMoEMLP`` block (CP and
tensor ring), of 32 experts for characters and 256 for words, which with its gate has no more
parameters than the dense MLP. The gate normalizes over the experts of one token, so that no token
sees a later one. All models get the same seeds, batches, optimizer and steps. Prints a table, and
the tokens that the most special experts of the last block read; figures, loss curves and a page on
all experts go to ``out/``. The full run takes some minutes, ``--quick`` some seconds.

Needs PyTorch, rich and matplotlib (``pip install 'tensormoe[torch,cli]'``). The characters are
those of the language reference that Python's ``help()`` shows, else of sources of the standard
library; the words are those of the King James Bible, if Debian's package bible-kjv is installed,
else of the same reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _comparison.compare import compare, parse, resolve_recipe
from _comparison.outcome import Model, Task, seen
from _comparison.text import Text, batches, load_text, windows
from _comparison.training import Recipe, Score, evaluate
from _comparison.variants import Variant, make_mlp
from _comparison.words import load_words
from _tables import make_console
from torch import Tensor, nn

from tensormoe import Gate
from tensormoe.analysis import Exploration, Tokens, explore_coefficients

Make = Callable[[int, int, int], nn.Module]
# batch norm would let a token see later ones in training
GATE = Gate("entmax", normalization="layer")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a GPT, in GPT-2's proportions: four times as many hidden units as channels."""

    depth: int = 3
    channels: int = 64
    heads: int = 4
    context: int = 128
    experts: int = 32


FULL = Sizes()
QUICK = Sizes(depth=1, channels=32, heads=2, context=32, experts=8)
RECIPE = Recipe(steps=1200, batch=16, rate=3e-3)
QUICK_RECIPE = Recipe(steps=60, batch=16, rate=5e-3, scores=3)
WORDS = Sizes(depth=2, channels=128, context=64, experts=256)
WORDS_RECIPE = Recipe(steps=1000, batch=16, rate=3e-3, scores=4)
# windows of the test text that the page is made of
EXPLORED = 256


class Attention(nn.Module):
    """Every token looks at itself and those before it."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs, self.output = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inputs(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return result


class Layer(nn.Module):
    """Attention, then an MLP, each behind a norm and around a shortcut (Radford et al. 2019)."""

    def __init__(self, channels: int, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        mixed: Tensor = x + self.mlp(self.norm_mlp(x))
        return mixed


class GPT(Model):
    """Ids (batch, T) → logits (batch, T, symbols) of the ids that follow.

    Args:
        sizes: of the model; T is at most ``sizes.context``.
        symbols: number of different tokens.
        mlp: what its MLPs are: a variant, or a function from features, hidden size and number of
            experts to a module.
    """

    def __init__(self, sizes: Sizes, symbols: int, mlp: Variant | Make) -> None:
        super().__init__()
        self.sizes = sizes
        channels = sizes.channels
        # what variants share comes first, so that it starts equal at an equal seed
        self.symbols = nn.Embedding(symbols, channels)
        self.places = nn.Embedding(sizes.context, channels)
        for table in (self.symbols, self.places):
            nn.init.normal_(table.weight, std=0.02)
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, symbols)
        attentions = [Attention(channels, sizes.heads) for _ in range(sizes.depth)]
        make = partial(make_mlp, mlp, gate=GATE) if isinstance(mlp, Variant) else mlp
        self.layers = nn.ModuleList(
            Layer(channels, each, make(channels, 4 * channels, sizes.experts))
            for each in attentions
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.symbols(ids) + self.places.weight[: ids.shape[-1]]
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def mlps(self, batch: int) -> list[tuple[nn.Module, int]]:
        rows = batch * self.sizes.context
        return [(layer.mlp, rows) for layer in self.layers if isinstance(layer, Layer)]


def make_task(text: Text, sizes: Sizes, recipe: Recipe, tokens: str = "characters") -> Task:
    """Predict the next token."""
    return Task(
        name="gpt" if tokens == "characters" else f"gpt-{tokens}",
        data=f"GPT of {tokens} on {text.name}: {len(text.train):,} training and "
        f"{len(text.test):,} test {tokens}",
        figure="loss",
        tokens=sizes.context,
        build=lambda variant: GPT(sizes, len(text.symbols), variant),
        batches=lambda seed: batches(text, sizes.context, recipe.batch, seed),
        score=lambda model: score(model, text, sizes.context),
        explore=lambda model, path: explore(model, text, sizes.context, path),
    )


def score(model: nn.Module, text: Text, context: int) -> Score:
    """Loss and accuracy over the test text, in windows side by side."""
    return evaluate(model, *windows(text.test, context), batch=32)


def explore(model: nn.Module, text: Text, context: int, path: Path) -> None:
    """A page on what the experts of the last block read in the test text."""
    assert isinstance(model, GPT)
    ids = windows(text.test, context)[0][:EXPLORED]
    gate = model.get_submodule(f"layers.{model.sizes.depth - 1}.mlp.gate")
    names = [symbol if symbol.strip() else repr(symbol) for symbol in text.symbols]
    found = explore_coefficients(
        torch.cat([seen(model, gate, some) for some in ids.split(32)]),
        ids,
        class_names=names,
        examples=Tokens([[text.symbols[each] for each in row] for row in ids.tolist()]),
        title="Experts of the last block: tokens that they read",
        path=path,
    )
    show(found)


def show(found: Exploration, count: int = 8) -> None:
    """Print the experts whose tokens are the farthest from all experts', and those tokens.

    Tokens are those that an expert gets the most often, compared with all experts, among those that
    are one in a thousand of its own.
    """
    level = found.levels[0]
    assert level.specialization is not None
    assert level.histogram is not None
    excess = np.nan_to_num(level.specialization.excess, nan=-1.0)
    mass = level.histogram.mass.sum(axis=0)
    console = make_console()
    for expert in np.argsort(-excess)[:count]:
        shares = level.histogram.shares[expert]
        more = np.where(shares >= 1e-3, shares * mass.sum() / np.maximum(mass, 1e-12), 0.0)
        read = [
            f"{found.class_names[place].strip()} {more[place]:.0f}×"
            for place in np.argsort(-more)[:8]
            if more[place] > 0
        ]
        console.print(
            f"expert {expert}, load {level.load.share[expert]:.2%}, {excess[expert]:.1f} bits "
            f"above chance: {' · '.join(read)}",
            soft_wrap=True,
        )


def main() -> None:
    words = parse(
        "A small GPT of experts next to the dense one, on real text.",
        tokens=("characters", "words"),
    )
    recipe, sizes = RECIPE, FULL
    if words.tokens == "words":
        vocabulary = 512 if words.quick else 2048
        text = load_words(vocabulary, holdout=words.holdout)
        recipe, sizes = WORDS_RECIPE, WORDS
        # a seed takes as long as three of characters
        words.seeds = words.seeds or 1
    else:
        text = load_text(holdout=words.holdout)
    if words.quick:
        recipe, sizes = QUICK_RECIPE, replace(QUICK, experts=sizes.experts // 4)
        text = replace(text, test=text.test[:20_000])
    recipe = resolve_recipe(recipe, words)
    torch.use_deterministic_algorithms(True)
    compare(make_task(text, sizes, recipe, words.tokens), recipe, words)


if __name__ == "__main__":
    main()
