"""A small GPT on real text, and what one of its MLPs reads and writes: the subject of study_mxd."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from _comparison.text import Text, batches, load_text, windows
from _comparison.training import Recipe, Run, Score, evaluate, train
from _comparison.variants import DENSE
from gpt_on_text import GPT, Sizes

COMMAND = ("bible", "gen1:1-rev22:21")
PIECES, CHUNK, EVERY = 1024, 8192, 16


@dataclass(frozen=True)
class Parts:
    """A text as ids of pieces: common words with the space before them, and single characters.

    Args:
        name: where it is from.
        train: (pieces,) ids to train on.
        held: to choose settings by.
        test: to be looked at once.
        pieces: how many there are of different ones.
    """

    name: str
    train: Tensor
    held: Tensor
    test: Tensor
    pieces: int


@cache
def load_parts() -> Parts:
    """The King James Bible of Debian's package bible-kjv, else what ``help()`` shows of Python.

    In every sixteen chunks of 8192 pieces, one is held out and one is for tests.
    """
    try:
        raw = subprocess.run(COMMAND, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        name, text = "the King James Bible", raw.stdout
    except FileNotFoundError:
        name, text = _reference()
    found = re.findall(r" ?\w+|.", text, flags=re.DOTALL)
    characters = sorted(set(text))
    words = Counter(piece for piece in found if len(piece) > 1)
    common = [word for word, _ in words.most_common(PIECES - len(characters))]
    ids = {piece: place for place, piece in enumerate([*characters, *common])}
    spelled = (part for piece in found for part in ([piece] if piece in ids else piece))
    chunks = torch.tensor([ids[part] for part in spelled]).split(CHUNK)
    held, test = (torch.cat(chunks[start::EVERY]) for start in (EVERY // 2, EVERY - 1))
    rest = [chunk for k, chunk in enumerate(chunks) if k % EVERY not in (EVERY // 2, EVERY - 1)]
    return Parts(name, torch.cat(rest), held, test, len(ids))


def _reference() -> tuple[str, str]:
    text = load_text()
    joined = torch.cat([text.train, text.test]).tolist()
    return text.name, "".join(text.symbols[each] for each in joined)


@dataclass(eq=False)
class Host:
    """A trained model, one of whose MLPs is replaced for a while.

    Args:
        name: the text, in words.
        model: a GPT.
        layer: the number of the MLP's layer.
        inputs: what the MLP is given for training text, (tokens, channels).
        held: for held-out text.
        texts: ids by part of the text: "held" and "test".
    """

    name: str
    model: GPT
    layer: int
    inputs: Tensor
    held: Tensor
    texts: dict[str, Tensor]
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def mlp(self) -> nn.Sequential:
        """The MLP itself."""
        found: nn.Sequential = self.model.layers[self.layer].mlp
        return found

    def loss(self, part: str, student: nn.Module | None = None) -> float:
        """Cross-entropy per piece, with a student in the MLP's place."""
        ids, context = self.texts[part], self.model.sizes.context
        if student is None:
            if part not in self.losses:
                self.losses[part] = score(self.model, ids, context).loss
            return self.losses[part]
        place, own = self.model.layers[self.layer], self.mlp
        place.mlp = _OnTokens(student)
        try:
            return score(self.model, ids, context).loss
        finally:
            place.mlp = own


class _OnTokens(nn.Module):
    """A module of (tokens, channels), called with windows of them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.eval()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x.flatten(0, -2)).reshape(x.shape)
        return y


def make_host(
    parts: Parts, sizes: Sizes, recipe: Recipe, path: Path, layer: int, inputs: int, scored: int
) -> Host:
    """A model, from a file if it was trained before, and what one of its MLPs is given."""
    model = train_model(parts, sizes, recipe, path)
    return Host(
        f"{parts.name}: {len(parts.train):,} pieces to train on, {parts.pieces:,} different ones",
        model,
        layer,
        collect(model, layer, parts.train[:inputs]),
        collect(model, layer, parts.held[:scored]),
        {"held": parts.held[:scored], "test": parts.test[:scored]},
    )


@torch.no_grad()
def collect(model: GPT, layer: int, ids: Tensor) -> Tensor:
    """Inputs (tokens, channels) of a layer's MLP, for windows side by side."""
    found: list[Tensor] = []
    keep = model.layers[layer].mlp.register_forward_pre_hook(
        lambda _, given: found.append(given[0].flatten(0, -2))
    )
    try:
        for some in windows(ids, model.sizes.context)[0].split(64):
            model(some)
    finally:
        keep.remove()
    return torch.cat(found)


def train_model(parts: Parts, sizes: Sizes, recipe: Recipe, path: Path) -> GPT:
    """The model, from a file if it was trained before."""
    torch.manual_seed(0)
    model = GPT(sizes, parts.pieces, DENSE)
    if path.exists():
        model.load_state_dict(torch.load(path))
    else:
        text = Text(parts.name, parts.train, parts.held, "")

        def report(run: Run) -> None:
            if len(run.losses) % 100 == 0:
                print(len(run.losses), mean(run.losses[-100:]), file=sys.stderr, flush=True)

        train(
            model,
            batches(text, sizes.context, recipe.batch, seed=0),
            recipe,
            lambda each: score(each, parts.held, sizes.context),
            report,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(model.state_dict(), part)
        part.replace(path)
    return model.eval().requires_grad_(False)


def score(model: nn.Module, ids: Tensor, context: int) -> Score:
    """Cross-entropy per piece and accuracy, over windows side by side."""
    return evaluate(model, *windows(ids, context), batch=32)
