"""A mixture of convolutions from a convolution, with a report of how well it fits."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.nn.parameter import is_lazy

from tensormoe.errors import SpecError
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import Fit, checked_noise
from tensormoe.gates import Gate
from tensormoe.mixtures import conv_config
from tensormoe.selection import Budget
from tensormoe_torch._dtypes import FLOATS
from tensormoe_torch.mixtures._conv import ConvMoE
from tensormoe_torch.surgery._convert import fit_experts
from tensormoe_torch.surgery._linears import Linear, check_values

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def from_conv(
    conv: nn.Module,
    experts: int | tuple[int, ...],
    factorization: FactorizationLike = "cp",
    *,
    experts_per: str = "image",
    rank: int | tuple[int, ...] | None = None,
    budget: Budget | int | None = None,
    gate: Gate | str | None = "entmax",
    noise: float = 0.0,
) -> tuple[ConvMoE, Fit]:
    """A mixture whose experts all equal a convolution, as well as its rank allows.

    It is to a convolution what :func:`from_linear` makes of a linear layer: kernels are matrices
    (kernel · in, out), and where the bonds do not admit the rank of one, experts equal its
    truncated singular value decomposition.

    Args:
        conv: an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` without groups, padded with zeros.
        experts: N, or one size per level of hierarchy.
        factorization: a value such as ``CP(rank=64)``, or its name.
        experts_per: "image" or "position", as for :class:`ConvMoE`.
        rank: bond sizes, with a name.
        budget: parameters of the layer with its gate instead. Without rank or budget the factors
            get those of ``conv``, and the gate comes on top.
        gate: how channels become coefficients, or None.
        noise: how far experts start from the convolution, relative to its weights. Experts that
            are all equal get equal gradients: a layer that is to be trained needs some, such as
            0.1, which sums to zero over the experts.

    Returns:
        The layer, in the dtype, on the device and in the mode of ``conv`` and sharing no memory
        with it, and how well it fits.

    Raises:
        SpecError: not such a convolution, weights without finite values, or arguments that cannot
            be.
        RankError, BudgetError: as :class:`ConvMoE`.

    >>> import torch
    >>> from torch import nn
    >>> conv = nn.Conv2d(4, 6, 3, padding=1)
    >>> layer, fit = from_conv(conv, experts=8, rank=6)
    >>> x = torch.randn(2, 4, 9, 9)
    >>> torch.allclose(layer(x), conv(x), atol=1e-4), fit.error < 1e-5
    (True, True)
    """
    kind = next((kind for kind in _KINDS if isinstance(conv, kind)), None)
    if kind is None or type(conv).forward is not kind.forward or "forward" in vars(conv):
        raise SpecError(
            "conv must be an nn.Conv1d, nn.Conv2d or nn.Conv3d that runs as one; got "
            f"{type(conv).__name__}. Take off what it adds first."
        )
    assert isinstance(conv, _KINDS)
    if conv.groups != 1 or conv.padding_mode != "zeros":
        raise SpecError(
            f"conv must have one group and a padding of zeros; got groups={conv.groups} and "
            f"padding_mode={conv.padding_mode!r}. Pad images yourself; leave grouped convolutions."
        )
    weight = conv.weight
    if is_lazy(weight) or weight.dtype not in FLOATS:
        raise SpecError(
            f"conv must have floating-point weights; got {type(weight).__name__} of "
            f"{weight.dtype}. Run a lazy layer once, or dequantize it."
        )
    noise = checked_noise(noise)
    config = conv_config(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        experts=experts,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        experts_per=experts_per,
        factorization=factorization,
        rank=rank,
        budget=budget,
        bias=conv.bias is not None,
        gate=gate,
    )
    axes = len(conv.kernel_size)
    # kernels as the experts' matrices have them: offsets, channels, output
    table = weight.detach().permute(*range(2, axes + 2), 1, 0).reshape(-1, conv.out_channels)
    linear = Linear(table, None if conv.bias is None else conv.bias.detach())
    check_values(linear, "conv")
    layer = ConvMoE.of(config, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
    if layer.gate is not None:
        layer.gate.reset_parameters()
    gated = replace(config.experts, gate=config.gate)
    fit = fit_experts(layer.experts, gated, linear, noise, linear.num_parameters)
    return layer.train(conv.training), replace(fit, parameters_after=config.num_parameters)
