"""Factorized convolutions beside ``nn.Conv2d``, dense experts, and the other ways to run them.

Kernels 3 × 3 with padding 1, 8 experts, CP, float32, one thread; processor time, ratios in one run.
Factors have the parameters of the ``nn.Conv2d`` unless a rank is named, and coefficients are the
gate's. Dense experts have as many kernels of full rank: their kernels are mixed for each image and
run as one grouped convolution (CondConv), or all experts are run at each position. Above 1, the
other one takes longer.

    python benchmarks/bench_mixtures.py conv
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from _shared import interleaved
from torch import Tensor, nn

from tensormoe.planning._convolved import ConvDraft, Way
from tensormoe.planning._regimes import regimes_of
from tensormoe_torch import ConvMoE

EXPERTS = 8
LAYERS = (
    # channels, out, size, images, rank
    (3, 32, 32, 32, None),
    (16, 32, 32, 8, None),
    (64, 64, 28, 8, None),
    (64, 64, 28, 8, 16),
    (64, 64, 28, 8, 160),
    (128, 128, 14, 8, None),
    (256, 256, 7, 8, None),
)
WAYS: tuple[Way, ...] = ("patches", "convolution", "kernels")
Call = Callable[[], object]


class DenseExperts(nn.Module):
    """The experts of a layer, multiplied out, with its gate."""

    def __init__(self, ours: ConvMoE) -> None:
        super().__init__()
        kernels, biases = (each.detach() for each in ours.materialize() if each is not None)
        self.kernels, self.biases = nn.Parameter(kernels), nn.Parameter(biases)
        self.ours = [ours]

    def forward(self, x: Tensor) -> Tensor:
        (given,) = self.ours[0].coefficients(x)
        count, out = x.shape[0], self.kernels.shape[1]
        if given.ndim == 2:
            weight = (given @ self.kernels.flatten(1)).reshape(-1, *self.kernels.shape[2:])
            bias = (given @ self.biases).flatten()
            merged = x.reshape(1, -1, *x.shape[2:])
            return F.conv2d(merged, weight, bias, padding=1, groups=count).reshape(
                count, out, *x.shape[2:]
            )
        made = F.conv2d(x, self.kernels.flatten(0, 1), self.biases.flatten(), padding=1)
        made = made.reshape(count, -1, out, *x.shape[2:])
        return torch.einsum("bnohw,bhwn->bohw", made, given)


def forced(layer: ConvMoE, way: Way) -> ConvMoE | None:
    """The layer, run in one way alone; None if there is none such."""
    factors: Any = layer.experts.factors
    programs, network = factors.programs, layer.config.experts.spec.network
    form = programs.form
    if way not in form.ways:
        return None
    sizes = (4, 64, 1024, 16384) if form.per_image else (1,)
    groups = [regimes_of([ConvDraft(network, form, way, size)]) for size in sizes]
    other = ConvMoE.of(layer.config)
    other.load_state_dict(layer.state_dict())
    held: Any = other.experts.factors
    held.programs = replace(programs, groups=tuple(groups))
    return other


def forward(module: nn.Module, x: Tensor) -> Call:
    """A call that records nothing for gradients."""

    def call() -> object:
        with torch.no_grad():
            return module(x)

    return call


def step(module: nn.Module, x: Tensor) -> Call:
    """Forward and backward, with gradients of parameters and input."""
    given = x.clone().requires_grad_()

    def call() -> object:
        module.zero_grad()
        given.grad = None
        return module(given).square().mean().backward()

    return call


def run(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each figure")
    parser.add_argument("--step", action="store_true", help="forward and backward")
    words = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make = step if words.step else forward
    print(f"{'forward and backward' if words.step else 'forward'}, one thread")
    print(f"PyTorch {torch.__version__}\n")
    heads = "layer | per | rank | way | ours, ms | nn.Conv2d | dense experts"
    print(f"| {heads} | {' | '.join(WAYS)} |")
    print("| --- | --- | ---: | --- |" + " ---: |" * 6)
    for channels, out, size, images, rank in LAYERS:
        x = torch.randn(images, channels, size, size)
        for per in ("image", "position"):
            ours = ConvMoE(channels, out, 3, experts=EXPERTS, padding=1, rank=rank, experts_per=per)
            with torch.no_grad():
                for parameter in ours.gate.parameters():  # type: ignore[union-attr]
                    parameter.normal_()
            plain = nn.Conv2d(channels, out, 3, padding=1)
            dense = DenseExperts(ours)
            with torch.no_grad():
                torch.testing.assert_close(ours(x), dense(x), rtol=1e-3, atol=1e-4)
            others = {way: forced(ours, way) for way in WAYS}
            modules = [ours, plain, dense, *(each for each in others.values() if each is not None)]
            times = interleaved([make(each, x) for each in modules], words.seconds, process_time)
            mine, *rest = times
            ratios = [f"× {each / mine:.2f}" for each in rest]
            for place, other in enumerate(others.values()):
                if other is None:
                    ratios.insert(2 + place, "")
            found: Any = ours.config.experts.spec.factorization
            way = ours.plan((size, size), images).way
            print(
                f"| {images} × {channels} → {out}, {size}² | {per} | {found.rank} | {way} | "
                f"{1e3 * mine:.2f} | {' | '.join(ratios)} |",
                flush=True,
            )
