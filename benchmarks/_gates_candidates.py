"""Gates that the study compares: the library's own, and others as plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tensormoe.factorizations import Factorization
from tensormoe.gates import entmax
from tensormoe_torch import MuMoE

__all__ = ["CANDIDATES", "Candidate", "Mixture"]


@dataclass(frozen=True)
class Candidate:
    """A rule from logits to coefficients.

    Args:
        norm: "layer", "rms", "batch", "centred" (layer norm of logits less their running mean over
            earlier batches) or "none".
        eps: added to the variance; times N where ``eps_grows``.
        spread: standard deviation of normalized logits; None for (scale / N)^(α - 1).
        scale: number of experts whose logits are spread by 1.
        eps_grows: whether ``eps`` is that of one expert.
        activation: "entmax" or "top_k".
        alpha: of entmax; 1 is softmax, 2 is sparsemax.
        noise: standard deviation of the logits of an input of unit entries, at the start.
        learned: "", or what is learned besides: "temperature", "temperatures" (one per expert),
            "affine" or "alpha".
    """

    norm: str = "layer"
    eps: float = 1.0
    spread: float | None = None
    scale: float = 8.0
    eps_grows: bool = False
    activation: str = "entmax"
    alpha: float = 1.5
    noise: float = 0.0
    learned: str = ""

    def eps_of(self, experts: int) -> float:
        """The eps of a gate of so many experts."""
        return self.eps * (experts if self.eps_grows else 1)

    def spread_of(self, experts: int) -> float:
        """The spread of a gate of so many experts."""
        if self.norm == "none":
            return 1.0
        spread = (
            (self.scale / experts) ** (self.alpha - 1.0) if self.spread is None else self.spread
        )
        return float(spread)


def _candidates() -> dict[str, Candidate]:
    new = Candidate()
    old = Candidate(eps=1e-5, spread=1.0)
    found = {"paper: layer norm, eps 1e-5, spread 1": old, "default: eps 1, spread √(8/N)": new}
    found |= {f"eps {eps:g}, spread 1": replace(old, eps=eps) for eps in (1.0, 10.0, 100.0)}
    found |= {
        "eps 0.1 N, spread 1": replace(old, eps=0.1, eps_grows=True),
        "eps 1, spread 2/√N": replace(new, scale=4.0),
        "eps 1, spread 4/√N": replace(new, scale=16.0),
        "eps 1e-5, spread √(8/N)": replace(new, eps=1e-5),
        "eps 0.1, spread √(8/N)": replace(new, eps=0.1),
        "eps 10, spread √(8/N)": replace(new, eps=10.0),
        "eps 1, spread 1/4": replace(new, spread=0.25),
        "no norm": replace(old, norm="none"),
        "rms norm": replace(new, norm="rms"),
        "paper: batch norm, eps 1e-5, spread 1": replace(old, norm="batch"),
        "batch norm": replace(new, norm="batch"),
        "centred": replace(new, norm="centred"),
        "paper's, small random projections": replace(old, noise=0.1),
        "small random projections": replace(new, noise=0.1),
        "temperature learned": replace(new, learned="temperature"),
        "temperature per expert learned": replace(new, learned="temperatures"),
        "affine": replace(new, learned="affine"),
        "α learned": replace(new, learned="alpha"),
        "α 1.25": replace(new, alpha=1.25),
        "softmax, eps 1e-5, spread 1": replace(old, alpha=1.0),
        "softmax": replace(new, alpha=1.0),
        "sparsemax, eps 1e-5, spread 1": replace(old, alpha=2.0),
        "sparsemax": replace(new, alpha=2.0),
        "top 4, random projections": replace(new, activation="top_k", alpha=1.0, noise=0.1),
    }
    return found


CANDIDATES = _candidates()
"""By the name that tables have."""


class Mixture(nn.Module):
    """An expert layer (or two, with an activation between) whose coefficients a candidate makes.

    Args:
        candidate: the gate.
        layers: input and output sizes of each layer, and its factorization with a rank.
        experts: one number per level.
    """

    def __init__(
        self,
        candidate: Candidate,
        layers: list[tuple[int, int, Factorization]],
        experts: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.candidate, self.experts = candidate, experts
        self.layers = nn.ModuleList(
            MuMoE(rows, columns, experts, kind, gate=None) for rows, columns, kind in layers
        )
        features = layers[0][0]
        self.projections = nn.ParameterList(
            torch.randn(features, count) * candidate.noise / features**0.5 for count in experts
        )
        sizes = {"temperature": (1,), "alpha": (1,)}
        learned = [sizes.get(candidate.learned, (count,)) for count in experts]
        if candidate.learned:
            self.scales = nn.ParameterList(torch.zeros(size) for size in learned)
        if candidate.learned == "affine":
            self.shifts = nn.ParameterList(torch.zeros(size) for size in learned)
        self.norms = nn.ModuleList()
        if candidate.norm == "batch":
            self.norms.extend(
                nn.BatchNorm1d(count, candidate.eps_of(count), affine=False) for count in experts
            )
        for level, count in enumerate(experts):
            self.register_buffer(f"mean_{level}", torch.zeros(count))

    def coefficients(self, x: Tensor) -> list[Tensor]:
        """Coefficients (..., N_e) per level."""
        return [
            self._activated(self._normed(x @ projection, level), level)
            for level, projection in enumerate(self.projections)
        ]

    def forward(self, x: Tensor) -> Tensor:
        given = self.coefficients(x)
        first, *rest = self.layers
        x = first(x, coefficients=given)
        for layer in rest:
            x = layer(nn.functional.gelu(x), coefficients=given)
        return x

    def _normed(self, z: Tensor, level: int) -> Tensor:
        rule = self.candidate
        eps, spread = rule.eps_of(z.shape[-1]), rule.spread_of(z.shape[-1])
        if rule.norm == "batch":
            return spread * self.norms[level](z)
        if rule.norm == "rms":
            return spread * z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
        if rule.norm == "centred":
            mean = getattr(self, f"mean_{level}")
            if self.training:
                now = z.detach().mean(0)
                z = z - mean
                mean.lerp_(now, 0.1)
            else:
                z = z - mean
        if rule.norm in ("layer", "centred"):
            z = z - z.mean(-1, keepdim=True)
            z = spread * z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
        return z

    def _activated(self, z: Tensor, level: int) -> Tensor:
        rule = self.candidate
        if rule.activation == "top_k":
            values, indices = z.topk(4)
            return torch.zeros_like(z).scatter(-1, indices, values.softmax(-1))
        if rule.learned in ("temperature", "temperatures", "affine"):
            z = z * self.scales[level].exp()
        if rule.learned == "affine":
            z = z + self.shifts[level]
        if rule.learned == "alpha":
            return _LearnedEntmax.apply(z, 1.0 + torch.sigmoid(self.scales[level]))
        return z.softmax(-1) if rule.alpha == 1.0 else _Entmax.apply(z, rule.alpha)


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, z: Tensor, alpha: float) -> Tensor:
        weights = entmax(z, alpha)
        ctx.save_for_backward(weights)  # type: ignore[attr-defined]
        ctx.alpha = alpha  # type: ignore[attr-defined]
        return weights

    @staticmethod
    def backward(ctx: object, given: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return _pulled(weights, given, ctx.alpha), None  # type: ignore[attr-defined]


class _LearnedEntmax(torch.autograd.Function):
    """The same with a derivative by α (Correia, Niculae & Martins 2019, eq. 9)."""

    @staticmethod
    def forward(ctx: object, z: Tensor, alpha: Tensor) -> Tensor:
        weights = entmax(z, float(alpha))
        ctx.save_for_backward(weights, alpha)  # type: ignore[attr-defined]
        return weights

    @staticmethod
    def backward(ctx: object, given: Tensor) -> tuple[Tensor, Tensor]:
        weights, alpha = ctx.saved_tensors  # type: ignore[attr-defined]
        power = float(alpha) - 1.0
        inside = weights > 0
        slope = torch.where(inside, weights.clamp_min(1e-30) ** (1.0 - power), 0.0)
        skewed = slope / slope.sum(-1, keepdim=True)
        entropy = torch.where(inside, weights * weights.clamp_min(1e-30).log(), 0.0)
        by_alpha = (weights - skewed) / power**2
        by_alpha = by_alpha - (entropy - skewed * entropy.sum(-1, keepdim=True)) / power
        return _pulled(weights, given, float(alpha)), (given * by_alpha).sum().reshape(1)


def _pulled(weights: Tensor, given: Tensor, alpha: float) -> Tensor:
    """The gradient by logits."""
    slope = torch.where(weights > 0, weights.clamp_min(1e-30) ** (2.0 - alpha), 0.0)
    mean = (slope * given).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)
    return slope * (given - mean)
