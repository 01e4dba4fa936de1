"""The layers that the benchmark against peers compares, each built as a user would build it.

Peers that mix experts are brought to the same sizes as far as they allow: linear experts where a
package takes experts from outside, and otherwise what it ships. What still differs is in ``NOTES``.
Third-party packages are imported by the functions that need them: importing tensorly-torch switches
TensorLy's backend for the whole process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from _peers_modules import (
    FEATURES,
    HIDDEN,
    DenseMLPMoE,
    DenseMoE,
    GroupedLinear,
    OneDNNLinear,
    OneSequence,
)
from torch import nn

from tensormoe_torch import MuMoE, MuMoEMLP

NOTES = (
    "parameters count gates; ours spend the linear layer's budget on the experts alone, "
    "so the gate's 768·N come on top, as they do in every mixture here",
    "gates: ours layer norm and entmax-1.5, dense MoE softmax, st-moe-pytorch and "
    "mixture-of-experts top 2 with a random second choice, soft-moe-pytorch slots",
    "st-moe-pytorch and mixture-of-experts drop tokens that exceed an expert's capacity "
    "(at least 4 slots, which run whether filled or not); the others use every token",
    "soft-moe-pytorch runs max(1, tokens / experts) slots per expert, mixes tokens among "
    "each other, and normalizes its input",
    "linear experts: given to st-moe-pytorch and mixture-of-experts by their argument; "
    "soft-moe-pytorch has none, its experts were replaced after construction",
    "MLP experts: mixture-of-experts has no biases; st-moe-pytorch has a gated unit of "
    "2048, which stores what 768 → 3072 → 768 stores; all use GELU",
    "products: ours run on oneDNN where PyTorch has it, the others' on MKL, which is about half as "
    "fast on processors that are not Intel's; the lines 'on oneDNN' are plain layers on the same "
    "kernels as ours, the fairer comparison of designs",
    "a training step adds the auxiliary losses of those that have them",
    "tensorly-torch has no experts: one layer that stores as much as nn.Linear, CP of the "
    "matrix itself and Tucker of (24, 32) × (24, 32), its fastest shapes for either",
)


@dataclass(frozen=True)
class Contender:
    """A layer of the comparison.

    Args:
        name: as printed.
        build: the module for so many experts; its forward returns the output (batch, out) or a pair
            of output and auxiliary loss.
        has_experts: whether the number of experts makes a difference.
        fit: prepares the module for a batch size, where its parameters depend on it.
        package: the distribution that it needs.
        ours: whether it is tensormoe's.
    """

    name: str
    build: Callable[[int], nn.Module]
    has_experts: bool = True
    fit: Callable[[nn.Module, int], None] | None = None
    package: str | None = None
    ours: bool = False


@dataclass(frozen=True)
class Comparison:
    """Layers of one shape; the first is what the others are measured against."""

    title: str
    contenders: Sequence[Contender]


def comparisons() -> tuple[Comparison, Comparison]:
    """Linear experts, and two-layer experts."""
    linear = Comparison(
        f"linear experts, {FEATURES} → {FEATURES}",
        (
            Contender("nn.Linear", lambda _: nn.Linear(FEATURES, FEATURES), has_experts=False),
            Contender("nn.Linear on oneDNN", lambda _: OneDNNLinear(FEATURES, FEATURES), False),
            Contender("tensorly-torch CP", _tensorly_cp, False, package="tensorly-torch"),
            Contender("tensorly-torch Tucker", _tensorly_tucker, False, package="tensorly-torch"),
            Contender("MuMoE CP", lambda n: _mumoe(n, "cp"), ours=True),
            Contender("MuMoE tensor ring", lambda n: _mumoe(n, "tensor_ring"), ours=True),
            Contender("dense MoE", DenseMoE),
            Contender("st-moe-pytorch", _st_moe_linear, package="st-moe-pytorch"),
            Contender("mixture-of-experts", _top_2_linear, package="mixture-of-experts"),
            Contender("soft-moe-pytorch", _soft_linear, fit=_fit_slots, package="soft-moe-pytorch"),
        ),
    )
    mlp = Comparison(
        f"MLP experts, {FEATURES} → {HIDDEN} → {FEATURES}",
        (
            Contender("MLP", lambda _: _mlp(), has_experts=False),
            Contender("MLP on oneDNN", lambda _: _mlp(OneDNNLinear), has_experts=False),
            Contender("MuMoEMLP CP", lambda n: _mumoe_mlp(n, "cp"), ours=True),
            Contender("MuMoEMLP tensor ring", lambda n: _mumoe_mlp(n, "tensor_ring"), ours=True),
            Contender("dense MoE", DenseMLPMoE),
            Contender("st-moe-pytorch", _st_moe, package="st-moe-pytorch"),
            Contender("mixture-of-experts", _top_2, package="mixture-of-experts"),
            Contender("soft-moe-pytorch", _soft, fit=_fit_slots, package="soft-moe-pytorch"),
        ),
    )
    return linear, mlp


def _mlp(linear: type[nn.Linear] = nn.Linear) -> nn.Module:
    return nn.Sequential(linear(FEATURES, HIDDEN), nn.GELU(), linear(HIDDEN, FEATURES))


def _mumoe(experts: int, factorization: str) -> nn.Module:
    return _with_open_gate(MuMoE(FEATURES, FEATURES, experts, factorization))


def _mumoe_mlp(experts: int, factorization: str) -> nn.Module:
    block = MuMoEMLP(FEATURES, HIDDEN, experts=experts, factorization=factorization)
    return _with_open_gate(block)


def _with_open_gate(layer: nn.Module) -> nn.Module:
    """Logits of a trained gate's size: at first they are near zero, and the root is found early."""
    for name, parameter in layer.named_parameters():
        if name.startswith("gate.projection"):
            nn.init.normal_(parameter, std=FEATURES**-0.5)
    return layer


def _tensorly_cp(_: int) -> nn.Module:
    return _tensorly("cp", (FEATURES,))


def _tensorly_tucker(_: int) -> nn.Module:
    return _tensorly("tucker", (24, 32))


def _tensorly(factorization: str, shape: tuple[int, ...]) -> nn.Module:
    from tltorch import FactorizedLinear

    layer: nn.Module = FactorizedLinear(
        shape, shape, factorization=factorization, rank="same", implementation="factorized"
    )
    return layer


def _st_moe_linear(experts: int) -> nn.Module:
    given = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(experts))
    return OneSequence(_st_moe_class()(dim=FEATURES, num_experts=experts, experts=given))


def _st_moe(experts: int) -> nn.Module:
    return OneSequence(_st_moe_class()(dim=FEATURES, num_experts=experts))


def _st_moe_class() -> Callable[..., nn.Module]:
    with warnings.catch_warnings():
        # its annotations use typing.Tuple, which the checker that it imports calls deprecated
        warnings.filterwarnings("ignore", r"(?s).*PEP 484 type hint typing.Tuple")
        from st_moe_pytorch import MoE
    layer: Callable[..., nn.Module] = MoE
    return layer


def _top_2_linear(experts: int) -> nn.Module:
    from mixture_of_experts import MoE

    given = GroupedLinear(experts)
    # the package makes its own experts even where it is given others: let them be tiny
    return OneSequence(MoE(dim=FEATURES, num_experts=experts, hidden_dim=1, experts=given))


def _top_2(experts: int) -> nn.Module:
    from mixture_of_experts import MoE

    layer = MoE(dim=FEATURES, num_experts=experts, hidden_dim=HIDDEN, activation=nn.GELU)
    return OneSequence(layer)


def _soft_linear(experts: int) -> nn.Module:
    from soft_moe_pytorch.soft_moe import Experts

    # hidden layers of one unit, thrown away at once
    soft = _soft(experts, 1 / FEATURES)
    given = [nn.Linear(FEATURES, FEATURES) for _ in range(experts)]
    soft.layer.experts = Experts(given, offload_unused_experts_to_cpu=False)
    return soft


def _soft(experts: int, expert_mult: float = HIDDEN / FEATURES) -> OneSequence:
    from soft_moe_pytorch import SoftMoE

    layer = SoftMoE(
        dim=FEATURES,
        num_experts=experts,
        num_slots=1,
        expert_mult=expert_mult,
        offload_unused_experts_to_cpu=False,
    )
    return OneSequence(layer)


def _fit_slots(module: nn.Module, batch: int) -> None:
    """As many slots as the package's ``seq_len`` gives, and at least one per expert."""
    soft = module.layer
    assert isinstance(soft, nn.Module)
    experts = soft.experts.num_experts
    soft.slot_embeds = nn.Parameter(torch.randn(experts, max(1, batch // experts), FEATURES))
