"""An MLP-Mixer whose MLPs are experts, on real images, next to the dense one of the same size.

    python examples/mixer_on_images.py
    python examples/mixer_on_images.py --quick

Both token- and channel-mixing MLPs become ``MuMoEMLP`` blocks (CP and tensor ring), which with
their gates have no more parameters than the dense MLPs. All models get the same seeds, batches,
optimizer and steps. Prints a table; figures, loss curves and a page on what the experts see go
to ``out/``. The full run takes
some minutes, ``--quick`` some seconds.

Needs PyTorch, rich and matplotlib (``pip install 'tensormoe[torch,demo]'``). The images are
Fashion-MNIST if Debian's package dataset-fashion-mnist is installed, else scikit-learn's digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from _comparison.compare import compare, parse, resolve_recipe
from _comparison.images import Images, batches, load_images
from _comparison.outcome import Model, Task, seen
from _comparison.training import Recipe, Score, evaluate
from _comparison.variants import Variant, make_mlp
from torch import Tensor, nn

from tensormoe import Gate
from tensormoe.analysis import Images as Pictures
from tensormoe.analysis import explore_coefficients

CLASSES = 10
# the paper's vision models normalize the gate's logits over the batch
GATE = Gate("entmax", normalization="batch")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Mixer, in the proportions of S-16: hidden sizes above tokens and channels."""

    depth: int = 2
    channels: int = 64
    token_hidden: int = 64
    channel_hidden: int = 256
    token_experts: int = 16
    channel_experts: int = 32


FULL = Sizes()
QUICK = Sizes(
    depth=1, channels=32, token_hidden=64, channel_hidden=128, token_experts=8, channel_experts=8
)
RECIPE = Recipe(steps=470, batch=128, rate=1e-2, scores=4)
QUICK_RECIPE = Recipe(steps=60, batch=64, rate=5e-3, scores=3)


class Layer(nn.Module):
    """Mix tokens, then channels (Tolstikhin et al. 2021), each around a shortcut."""

    def __init__(self, sizes: Sizes, tokens: int, variant: Variant) -> None:
        super().__init__()
        channels = sizes.channels
        self.norm_tokens, self.norm_channels = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.tokens = make_mlp(variant, tokens, sizes.token_hidden, sizes.token_experts, GATE)
        self.channels = make_mlp(
            variant, channels, sizes.channel_hidden, sizes.channel_experts, GATE
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm_tokens(x).mT.contiguous()).mT
        mixed: Tensor = x + self.channels(self.norm_channels(x))
        return mixed


class Mixer(Model):
    """Images (batch, height, width) → logits (batch, 10).

    Args:
        sizes: of the model.
        side: height and width of an image.
        patch: side of the squares that become tokens.
        variant: what its MLPs are.
    """

    def __init__(self, sizes: Sizes, side: int, patch: int, variant: Variant) -> None:
        super().__init__()
        self.sizes, self.patch, self.tokens = sizes, patch, (side // patch) ** 2
        # what variants share comes first, so that it starts equal at an equal seed
        self.stem = nn.Linear(patch * patch, sizes.channels)
        self.head = nn.Linear(sizes.channels, CLASSES)
        self.norm = nn.LayerNorm(sizes.channels)
        self.layers = nn.ModuleList(Layer(sizes, self.tokens, variant) for _ in range(sizes.depth))

    def forward(self, images: Tensor) -> Tensor:
        squares = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        x = self.stem(squares.flatten(3).flatten(1, 2))
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits

    def mlps(self, batch: int) -> list[tuple[nn.Module, int]]:
        layers = [layer for layer in self.layers if isinstance(layer, Layer)]
        by_tokens = [(layer.tokens, batch * self.sizes.channels) for layer in layers]
        return by_tokens + [(layer.channels, batch * self.tokens) for layer in layers]


def make_task(images: Images, sizes: Sizes, recipe: Recipe) -> Task:
    """Classify the images."""
    side = images.train.shape[-1]
    return Task(
        name="mixer",
        data=f"MLP-Mixer on {images.name}: {len(images.train):,} training and "
        f"{len(images.test):,} test images of {side} × {side}",
        figure="accuracy",
        tokens=(side // images.patch) ** 2,
        build=lambda variant: Mixer(sizes, side, images.patch, variant),
        batches=lambda seed: batches(images, recipe.batch, seed),
        score=lambda model: score(model, images),
        explore=lambda model, path: explore(model, images, path),
    )


def score(model: nn.Module, images: Images) -> Score:
    """Loss and accuracy on the test images."""
    return evaluate(model, images.test, images.test_labels, batch=500)


def explore(model: nn.Module, images: Images, path: Path) -> None:
    """A page on the images that experts of the last block are used for, all patches together."""
    assert isinstance(model, Mixer)
    few = images.test[:500]
    gate = model.get_submodule(f"layers.{model.sizes.depth - 1}.channels.gate")
    low, high = float(few.min()), float(few.max())
    explore_coefficients(
        seen(model, gate, few).mean(dim=1),
        images.test_labels[:500],
        classes=CLASSES,
        examples=Pictures(few, low=low, high=high),
        title="Experts of the last block: images that they are used for",
        path=path,
    )


def main() -> None:
    words = parse("An MLP-Mixer of experts next to the dense one, on real images.")
    recipe = resolve_recipe(QUICK_RECIPE if words.quick else RECIPE, words)
    images = load_images(holdout=words.holdout)
    if words.quick:
        images = images.part(1000)
    torch.use_deterministic_algorithms(True)
    compare(make_task(images, QUICK if words.quick else FULL, recipe), recipe, words)


if __name__ == "__main__":
    main()
