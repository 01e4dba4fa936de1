"""Change of a layer's output by Adam's steps, factor by factor, against ``nn.Linear``.

    python benchmarks/study_updates.py
    python benchmarks/study_updates.py --quick

Layers of many ranks, numbers of experts and widths take a small Adam step on a real loss: the cross
entropy of scikit-learn's digits, behind a random projection and ReLU, or the square error to a
random linear map. Experts come from the gate at its start (uniform) or one per input at random.

1. The change of the output by each factor alone, over the learning rate, measured and as
   ``tensormoe.factorizations.responses`` predicts it.
2. The change by all factors together after one and ten steps, over that of a linear layer at the
   same learning rate: with one rate for all, and with the multipliers of ``parameter_rules``.
   The same for the weights of one expert, and of the mean of all.
3. Norms of gradients by factor, over that of a linear layer's weight, which is how SGD moves them.

It takes about a minute of one core. Needs PyTorch and scikit-learn.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log, sqrt
from statistics import mean

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tensormoe import CP, Dense, Factorization, Hadamard, TensorRing, TensorTrain, Tucker
from tensormoe.factorizations import Response, responses
from tensormoe.functional import DIRECTIONS, parameter_rules
from tensormoe_torch import MuMoE

INPUTS, RATE, CLASSES = 256, 1e-4, 10


@dataclass(frozen=True)
class Case:
    """A layer's factorization and sizes."""

    factorization: Factorization
    width: int = 256
    out: int = 256
    experts: int | tuple[int, ...] = 16


CASES = (
    *(Case(CP(rank)) for rank in (8, 32, 128, 512)),
    *(Case(CP(64), 64, 64, experts) for experts in (16, 128, 1024, (32, 32))),
    *(Case(CP(64), *widths) for widths in ((64, 1024), (1024, 64), (1024, 1024))),
    *(Case(TensorRing(rank)) for rank in ((2, 2, 8), (4, 4, 32), (8, 8, 64), (16, 16, 8))),
    *(Case(TensorRing((4, 4, 16)), 64, 64, experts) for experts in (128, 1024)),
    Case(TensorRing((4, 4, 4, 16)), 64, 256, (32, 32)),
    *(Case(TensorTrain(rank)) for rank in ((4, 8), (16, 64))),
    Case(TensorTrain((4, 4, 16)), 256, 64, (16, 8)),
    *(Case(Tucker(rank)) for rank in ((4, 8, 8), (8, 64, 64))),
    Case(Tucker((4, 4, 32, 32)), 64, 64, (32, 32)),
    *(Case(Hadamard(), *widths) for widths in ((64, 64), (1024, 256))),
    *(Case(Dense(), *widths) for widths in ((64, 64), (256, 64))),
)
QUICK = tuple(case for case in CASES if case.width * case.out <= 64 * 64)

Loss = Callable[[Tensor], Tensor]


def digits(case: Case) -> tuple[Tensor, Loss]:
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images[:INPUTS])
    pixels = (pixels - pixels.mean(0)) / (pixels.std(0) + 1e-3)
    hidden = (pixels @ torch.randn(64, case.width, dtype=pixels.dtype) / 8).relu()
    head = torch.randn(case.out, CLASSES, dtype=pixels.dtype) / sqrt(case.out)
    wanted = torch.tensor(labels[:INPUTS])
    return F.layer_norm(hidden, (case.width,)), lambda y: F.cross_entropy(y @ head, wanted)


def regression(case: Case) -> tuple[Tensor, Loss]:
    x = torch.randn(INPUTS, case.width, dtype=torch.float64)
    wanted = x @ torch.randn(case.width, case.out, dtype=x.dtype) / sqrt(case.width)
    return x, lambda y: F.mse_loss(y, wanted)


TASKS = {"digits": digits, "regression": regression}


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


class Start:
    """A case at its start: layer, linear layer, inputs and coefficients."""

    def __init__(self, case: Case, task: str, sparse: bool) -> None:
        torch.manual_seed(0)
        self.x, self.loss = TASKS[task](case)
        self.layer = MuMoE(
            case.width, case.out, case.experts, case.factorization, dtype=torch.float64
        )
        self.linear = nn.Linear(case.width, case.out, dtype=torch.float64)
        self.coefficients = [
            F.one_hot(torch.randint(count, (INPUTS,)), count).double()
            if sparse
            else torch.full((INPUTS, count), 1 / count, dtype=torch.float64)
            for count in self.layer.spec.experts
        ]

    def run(self, module: nn.Module, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        if module is self.linear:
            return self.linear(x)
        return self.layer(x, [each[: len(x)] for each in self.coefficients])

    def named(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Factors, or the weight of the linear layer, with the bias; the gate stays as it is."""
        named = module.named_parameters()
        return {n: p for n, p in named if not n.startswith("gate.")}

    def gradients(self, module: nn.Module) -> dict[str, Tensor]:
        named = self.named(module)
        found = torch.autograd.grad(self.loss(self.run(module)), [*named.values()])
        return dict(zip(named, found, strict=True))

    @torch.no_grad()
    def by_factor(self, module: nn.Module) -> dict[str, float]:
        """Change of the output by one Adam step of one parameter at a time, over its rate."""
        with torch.enable_grad():
            gradients = self.gradients(module)
        before, found = self.run(module), {}
        for name, parameter in self.named(module).items():
            step = RATE * gradients[name].sign()
            parameter -= step
            found[name] = rms(self.run(module) - before) / RATE
            parameter += step
        return found

    @torch.no_grad()
    def weights(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """The weights of one expert, and the mean of all experts'; twice a linear layer's."""
        eye, nothing = torch.eye(self.x.shape[1], dtype=self.x.dtype), self.x[:1] * 0
        if module is self.linear:
            return (self.linear.weight.clone(),) * 2
        counts = self.layer.spec.experts
        first = [F.one_hot(torch.zeros(1, dtype=torch.long), n).double() for n in counts]
        even = [torch.full((1, n), 1 / n, dtype=torch.float64) for n in counts]
        return tuple(
            self.layer(eye, [each.expand(len(eye), -1) for each in mixed])
            - self.layer(nothing, mixed)
            for mixed in (first, even)
        )

    def after(
        self, module: nn.Module, steps: int, multipliers: dict[str, float]
    ) -> tuple[float, ...]:
        """Change of output, one expert and the mean after Adam's steps, over the rate."""
        named = self.named(module)
        saved = {name: each.detach().clone() for name, each in named.items()}
        adam = torch.optim.Adam(
            [{"params": [p], "lr": RATE * multipliers.get(n, 1.0)} for n, p in named.items()],
            eps=1e-30,
        )
        before = [self.run(module).detach(), *self.weights(module)]
        for _ in range(steps):
            for name, gradient in self.gradients(module).items():
                named[name].grad = gradient
            adam.step()
        changed = zip([self.run(module).detach(), *self.weights(module)], before, strict=True)
        found = tuple(rms(new - old) / RATE for new, old in changed)
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(saved[name])
        return found


def kind_of(name: str) -> str:
    """Factors by their part in a network."""
    short = name.removeprefix("factors.")
    return "experts" if short.startswith("expert_") else short


def spread(values: list[float]) -> str:
    """Geometric mean, with the smallest and the largest."""
    middle = exp(mean(log(each) for each in values))
    return f"{middle:.2f} ({min(values):.2f} – {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest layers alone")
    parser.add_argument("--cases", action="store_true", help="print a line per case as well")
    words = parser.parse_args()
    torch.set_num_threads(1)
    cases = QUICK if words.quick else CASES
    for task in TASKS:
        for sparse in (False, True):
            show(task, sparse, cases, words.cases)


def show(task: str, sparse: bool, cases: tuple[Case, ...], every: bool) -> None:
    # gradients of random maps have as many directions as there are inputs
    directions = DIRECTIONS if task == "digits" else float(INPUTS)
    ratios, norms = defaultdict(list), defaultdict(list)
    totals: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        start = Start(case, task, sparse)
        spec, linear = start.layer.spec, start.by_factor(start.linear)
        predicted = responses(spec.network, spec.initializers())
        width = float(case.width)
        alone = Response(width, width).size(directions)
        ratios["nn.Linear weight"].append(linear["weight"] / alone)
        for name, size in start.by_factor(start.layer).items():
            wanted = predicted[name.removeprefix("factors.")].size(directions)
            ratios[kind_of(name)].append(size / wanted)
        weight = start.gradients(start.linear)["weight"].norm().item()
        for name, gradient in start.gradients(start.layer).items():
            norms[kind_of(name)].append(gradient.norm().item() / weight)
        rules = parameter_rules(start.layer.config, directions=directions)
        chosen = {name: rule.multiplier for name, rule in rules.items()}
        line = []
        for steps in (1, 10):
            base = start.after(start.linear, steps, {})
            for mode, given in (("one rate", {}), ("multipliers", chosen)):
                found = start.after(start.layer, steps, given)
                for what, mine, other in zip(WHAT, found, base, strict=True):
                    totals[f"{mode}, {steps} step(s), {what}"].append(mine / other)
                line.append(f"{mode} {steps}: {found[0] / base[0]:.2f}")
        if every:
            print(case, "; ".join(line), flush=True)
    experts = "one expert per input" if sparse else "uniform gate"
    print(f"\n{task}, {experts}, {directions:g} directions, {len(cases)} layers")
    print("geometric mean (smallest – largest)")
    for title, found in (
        ("output by factor, measured / predicted", ratios),
        ("gradient norm / that of nn.Linear's weight", norms),
        ("all factors together / nn.Linear", totals),
    ):
        print(f"  {title}")
        for name, values in found.items():
            print(f"    {name:40} {spread(values)}")


WHAT = ("output", "one expert", "mean of experts")

if __name__ == "__main__":
    main()
