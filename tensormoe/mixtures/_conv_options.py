"""Configuration of a factorized mixture of convolutions from the arguments of a constructor."""

from __future__ import annotations

from dataclasses import replace

from tensormoe._resolve import Options
from tensormoe._validation import positive_int
from tensormoe.errors import SpecError
from tensormoe.factorizations import Dense, FactorizationLike
from tensormoe.gates import Gate
from tensormoe.mixtures._budget import within_budget
from tensormoe.mixtures._conv import ConvConfig
from tensormoe.mixtures._window import Padding, Sizes, window
from tensormoe.selection import Budget


def conv_config(
    in_channels: int,
    out_channels: int,
    kernel_size: Sizes,
    *,
    experts: int | tuple[int, ...],
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    dims: int = 2,
    experts_per: str = "image",
    factorization: FactorizationLike = "cp",
    rank: int | tuple[int, ...] | None = None,
    budget: Budget | int | None = None,
    bias: bool = True,
    gate: Gate | str | None = "entmax",
) -> ConvConfig:
    """The configuration of a factorized mixture of convolutions, from a constructor's arguments.

    Args:
        in_channels: of an image.
        out_channels: of the output.
        kernel_size: one number per spatial axis, or one for all of ``dims``.
        experts: N, or one size per level of hierarchy.
        stride: positions between outputs.
        padding: zeros on both sides; one number, one or two per axis, "valid" or "same".
        dilation: positions between entries of the kernel.
        groups: must be 1.
        dims: number of spatial axes, for a kernel size that is one number.
        experts_per: "image" or "position": what has a set of coefficients.
        factorization: a value such as ``CP(rank=64)``, or its name.
        rank: bond sizes, with a name. Without rank or budget, the factors get the parameters of
            one convolution of the same size, and the gate comes on top.
        budget: parameters of all that is built instead, experts and gate: a number, or a
            ``Budget(parameters=…)``, whose ``gate=False`` leaves the gate out.
        bias: whether every expert has a bias.
        gate: how channels become coefficients: a :class:`tensormoe.Gate` or the name of its
            activation; None for a layer that is always given coefficients.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.

    >>> config = conv_config(16, 32, 3, experts=8, padding=1)
    >>> config.experts.spec.num_parameters, 16 * 32 * 3 * 3 + 32
    (4625, 4640)
    """
    if positive_int(groups, "groups") != 1:
        raise SpecError(
            f"groups must be 1, as experts share their factors over all channels; got {groups}. "
            "Leave it out, or use one layer per group."
        )
    opening = window(kernel_size, stride, padding, dilation, dims)
    channels = positive_int(in_channels, "in_channels")
    columns = positive_int(out_channels, "out_channels")
    rows = channels * opening.volume
    options = Options(experts, factorization, rank, None, bias, gate)
    if budget is not None:
        bought = within_budget(
            budget,
            (factorization, factorization),
            rank,
            (rows, None, columns),
            experts,
            bias=bias,
            router=Options(experts, Dense(), None, None, bias, gate)
            .layer(channels, columns)
            .gate_parameters,
        )[1]
        options = replace(options, factorization=bought, rank=None)
    layer = options.layer(rows, columns)
    return ConvConfig(replace(layer, gate=None), layer.gate, opening, experts_per)
