"""Speed of the layer on PyTorch, as ratios taken in one run.

768 → 768 on the CPU, float32, at the parameter budget of the linear layer (the gate not counted),
gate included in every time:

- ``layer/products``: one forward call against the plan's matrix products alone, the gate's
  projection among them, by ``torch.matmul`` on operands that are there already;
- ``layer/own``: the same against those products as the layer runs them (oneDNN where that pays);
- ``direct/layer``: the direct formulation (ones joined to the input, one ``torch.einsum``, layer
  norm and ``entmax15`` of the entmax package, which sorts) against the layer;
- ``training``: the same for a forward and backward call, gradients of input and parameters.

Then lines for a single input, compiled (``torch.compile``, whole graph). The last ones are for
compiling itself, four blocks in a row, forward and backward, with nothing in the compiler's caches:
seconds with the usual gate and with ``torch.softmax`` of the logits in its place, each in a process
of its own, after another function has been compiled (which loads the compiler and its headers).
Processor time, that of the C++ compiler included.

    python benchmarks/bench_torch.py
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from time import perf_counter

import torch
from _shared import Call, interleaved
from _torch_layers import direct, products_of, stepped, trained
from torch import Tensor, nn

from tensormoe_torch import MuMoE, MuMoEMLP

FEATURES = 768


def compare(layer: MuMoE, batch: int, seconds: float) -> tuple[float, ...]:
    """Microseconds, and the four ratios."""
    x = torch.randn(batch, FEATURES)
    by_einsum = direct(layer, x)
    with torch.no_grad():
        if not torch.allclose(layer(x), by_einsum(), atol=1e-4):
            raise SystemExit("the layer and the direct formulation disagree")
        calls: list[Call] = [lambda: layer(x), *products_of(layer, x), by_einsum]
        ours, plain, own, einsum = interleaved(calls, seconds)
    x.requires_grad_()
    steps = [stepped(lambda: layer(x), layer, x), stepped(by_einsum, layer, x)]
    train, direct_train = interleaved(steps, seconds)
    return ours * 1e6, ours / plain, ours / own, einsum / ours, train * 1e6, direct_train / train


def compare_compiled(layer: MuMoE, seconds: float) -> tuple[float, float]:
    """Microseconds of one compiled call for one input, and its ratio to the products."""
    x = torch.randn(1, FEATURES)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        ours, plain, _ = interleaved([lambda: compiled(x), *products_of(layer, x)], seconds)
    return ours * 1e6, ours / plain


class SoftmaxGate(nn.Module):
    """The least that a gate can be."""

    def __init__(self, features: int, experts: int) -> None:
        super().__init__()
        self.projection_0 = nn.Parameter(torch.zeros(features, experts))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (torch.softmax(x @ self.projection_0, dim=-1),)


def compile_blocks(gate: str) -> None:
    """Compile four blocks, and print the seconds on the clock and on processors."""

    def timed(call: Callable[[], Tensor]) -> tuple[float, float]:
        def processor() -> float:
            usage = [getrusage(which) for which in (RUSAGE_SELF, RUSAGE_CHILDREN)]
            return sum(each.ru_utime + each.ru_stime for each in usage)

        start, busy = perf_counter(), processor()
        call().backward()
        return perf_counter() - start, processor() - busy

    blocks = [MuMoEMLP(256, 1024, 256, experts=64, factorization="cp", rank=64) for _ in range(4)]
    for block in blocks:
        block.gate = SoftmaxGate(256, 64) if gate == "softmax" else block.gate
    other = torch.randn(64, 64, requires_grad=True)
    timed(lambda: torch.compile(lambda x: (x.sin() @ x).exp().sum())(other))
    x = torch.randn(512, 256)
    compiled = torch.compile(nn.Sequential(*blocks), fullgraph=True)
    print(*timed(lambda: compiled(x).sum()))


def compile_times() -> None:
    """A table of what compiling takes, each gate in a process with empty caches."""
    print(f"\n{'compiling':>12} {'wall s':>9} {'processor s':>12}", flush=True)
    for gate in ("usual", "softmax"):
        with tempfile.TemporaryDirectory() as folder:
            ran = subprocess.run(
                [sys.executable, __file__, "--compile-blocks", gate],
                env=os.environ
                | {
                    "TORCHINDUCTOR_CACHE_DIR": folder,
                    "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
                    # in this process: workers that go on would not be counted
                    "TORCHINDUCTOR_COMPILE_THREADS": "1",
                },
                check=True,
                capture_output=True,
                text=True,
            )
        wall, busy = map(float, ran.stdout.split())
        print(f"{gate:>12} {wall:9.1f} {busy:12.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each comparison")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled lines out")
    parser.add_argument("--compile-blocks", choices=("usual", "softmax"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.compile_blocks:
        compile_blocks(options.compile_blocks)
        return
    print(
        f"PyTorch, {FEATURES} → {FEATURES}, float32, gate included; PyTorch {torch.__version__}, "
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads of "
        f"{os.cpu_count()} cores, {platform.machine()}"
    )
    head = f"{'layer':>12} {'rank':>12} {'experts':>7} {'batch':>5} {'layer µs':>9}"
    print(f"{head} layer/products layer/own direct/layer   step µs training", flush=True)
    layers = [
        (name, experts, made)
        for experts in (128, 1024, 8192)
        for name in ("cp", "tensor_ring")
        if (made := trained(name, experts, FEATURES)) is not None
    ]
    for name, experts, (layer, rank) in layers:
        for batch in (1, 64, 1024):
            row = compare(layer, batch, options.seconds)
            print(
                f"{name:>12} {rank!s:>12} {experts:7} {batch:5} {row[0]:9.0f} {row[1]:14.2f} "
                f"{row[2]:9.2f} {row[3]:12.2f} {row[4]:9.0f} {row[5]:8.2f}",
                flush=True,
            )
    if options.no_compile:
        return
    print(f"\n{'compiled':>12} {'rank':>12} {'experts':>7} {'batch':>5} {'layer µs':>9}", end="")
    print(" layer/products", flush=True)
    for name, experts, (layer, rank) in layers:
        if experts <= 1024:
            taken, ratio = compare_compiled(layer, options.seconds)
            print(
                f"{name:>12} {rank!s:>12} {experts:7} {1:5} {taken:9.0f} {ratio:14.2f}", flush=True
            )
    compile_times()


if __name__ == "__main__":
    main()
