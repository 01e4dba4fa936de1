"""Layers and blocks of experts from linear ones: each with a report of how well it fits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe.errors import SpecError
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import (
    BlockConfig,
    Fit,
    LayerConfig,
    Options,
    checked_noise,
    upcycle,
)
from tensormoe.gates import Gate
from tensormoe.selection import Budget
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._base import Mixture
from tensormoe_torch._layer import MuMoE
from tensormoe_torch._mlp import MuMoEMLP
from tensormoe_torch.surgery._block import Block, read_block
from tensormoe_torch.surgery._linears import Linear, read_linear

__all__ = [
    "block_config",
    "fit_experts",
    "fitted_block",
    "fitted_layer",
    "fresh_block",
    "from_linear",
    "from_mlp",
]


def from_linear(
    linear: nn.Module,
    experts: int | tuple[int, ...],
    factorization: FactorizationLike = "cp",
    *,
    rank: int | tuple[int, ...] | None = None,
    budget: Budget | int | str | None = None,
    gate: Gate | str | None = "entmax",
    noise: float = 0.0,
) -> tuple[MuMoE, Fit]:
    """A mixture whose experts all equal a linear layer, as well as its rank allows.

    Coefficients sum to one, so the output equals the linear layer's whatever the gate says: exactly
    if the bonds admit the rank of weights and bias as one table (in + 1, out), and otherwise that
    of the truncated singular value decomposition (Eckart and Young 1936).

    Args:
        linear: an ``nn.Linear``, or a ``Conv1D`` of Hugging Face.
        experts: N, or one size per level of hierarchy.
        factorization: a value such as ``CP(rank=64)``, or its name.
        rank: bond sizes, with a name.
        budget: upper limits for the layer with its gate instead, as for :class:`MuMoE`;
            ``"linear"`` stands for the parameters of ``linear``. Without rank or budget the factors
            get these, and the gate comes on top.
        gate: how inputs become coefficients, or None.
        noise: how far experts start from the linear layer, relative to its weights. Experts that
            are all equal get equal gradients, and their gate gets none but rounding: a layer that
            is to be trained needs some, such as 0.1. The noise of all experts sums to zero, so
            that a fresh gate, which mixes them evenly, still gives the linear layer's output; a
            top-k gate does not.

    Returns:
        The layer, in the dtype, on the device and in the mode of ``linear`` and sharing no memory
        with it, and how well it fits.

    Raises:
        SpecError: no linear layer, weights without finite values, or arguments that cannot be.
        RankError, BudgetError: as :class:`MuMoE`.

    >>> import torch
    >>> from torch import nn
    >>> linear = nn.Linear(8, 4)
    >>> layer, fit = from_linear(linear, experts=16, rank=4)
    >>> x = torch.randn(5, 8)
    >>> torch.allclose(layer(x), linear(x), atol=1e-5), fit.error < 1e-5
    (True, True)
    """
    found = read_linear(linear, "linear")
    noise = checked_noise(noise)
    options = Options(experts, factorization, rank, budget, gate=gate)
    layer, fit = fitted_layer(layer_config(found, options), found, noise)
    return layer.train(linear.training), fit


def from_mlp(
    mlp: nn.Module | tuple[nn.Module, Any, nn.Module] | tuple[nn.Module, Any, nn.Module, nn.Module],
    experts: int | tuple[int, ...],
    factorization: FactorizationLike | tuple[FactorizationLike, FactorizationLike] = "cp",
    *,
    rank: int | tuple[int, ...] | None = None,
    budget: Budget | int | str | None = None,
    gate: Gate | str | None = "entmax",
    noise: float = 0.0,
    drop: float | None = None,
) -> tuple[MuMoEMLP, Fit]:
    """A block of experts that equals an MLP, as well as its ranks allow: see :func:`from_linear`.

    Args:
        mlp: a module with two linear layers, or three if it is gated, an activation, and dropout,
            whatever their names: ``nn.Sequential``, timm's ``Mlp`` and ``SwiGLU``, Hugging Face's
            ViT, GPT-2, T5, Llama, Qwen and Mistral blocks, and the like. It runs a few times on
            made-up inputs, which shows whether it is ``fc2(act(fc1(x)))`` or
            ``down(act(gate(x)) * up(x))`` and no more. Or the parts, (fc1, act, fc2) or
            (gate, act, up, down), where ``act`` is a name, a module or a function. An activation
            without a name in :class:`MuMoEMLP` must be a module here, and the block holds a copy.
        experts: N, or one size per level of hierarchy.
        factorization: a value or a name for both layers, or a pair of them.
        rank: bond sizes of both layers, with a name.
        budget: upper limits for the block with its gate instead, as for :class:`MuMoEMLP`;
            ``"linear"`` stands for the parameters of the MLP. Without rank or budget the factors of
            each layer get those of the linear layer that it replaces, and the gate comes on top.
        gate: how inputs become coefficients, or None.
        noise: how far experts start from the given weights, relative to them.
        drop: share of entries dropped in training behind the activation and behind the second
            layer; by default the block's own, which must be one rate for both places then.

    Returns:
        The block, in the dtype, on the device and in the mode of ``mlp`` and sharing no memory with
        it, and how well it fits.

    Raises:
        SpecError: no MLP, weights without finite values, or arguments that cannot be.
        RankError, BudgetError: as :class:`MuMoEMLP`.

    >>> import torch
    >>> from torch import nn
    >>> mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    >>> block, fit = from_mlp(mlp, experts=4, factorization="hadamard", noise=0.1)
    >>> x = torch.randn(5, 8)
    >>> torch.allclose(block.eval()(x), mlp(x), atol=1e-2), fit.error < 1e-5
    (True, True)
    """
    found = read_block(mlp, "mlp")
    noise = checked_noise(noise)
    options = Options(experts, factorization, rank, budget, gate=gate)
    block, fit = fitted_block(block_config(found, options, drop, "mlp"), found, noise)
    mode = (mlp[0] if isinstance(mlp, tuple) else mlp).training
    return block.train(mode), fit


def layer_config(linear: Linear, options: Options) -> LayerConfig:
    """The configuration of the mixture that takes a linear layer's place."""
    return replace(options, bias=linear.bias is not None).layer(*linear.sizes)


def block_config(block: Block, options: Options, drop: float | None, name: str) -> BlockConfig:
    """The configuration of the block that takes an MLP's place."""
    if drop is None and len(set(block.drops)) > 1:
        raise SpecError(
            f"the dropout of {name} must have one rate behind the activation and behind the second "
            f"layer; got {block.drops[0]:g} and {block.drops[1]:g}. Give drop=…: 0.0 for none."
        )
    bias = any(linear.bias is not None for linear in block.linears)
    return replace(options, bias=bias).block(
        *block.sizes,
        block.activation,
        block.drops[0] if drop is None else drop,
        gated=block.up is not None,
    )


def fitted_layer(config: LayerConfig, linear: Linear, noise: float) -> tuple[MuMoE, Fit]:
    """A layer of a configuration whose experts equal a linear layer."""
    like = linear.weight
    # nothing is drawn only to be overwritten
    layer = MuMoE.of(config, device="meta", dtype=like.dtype).to_empty(device=like.device)
    if layer.gate is not None:
        layer.gate.reset_parameters()
    return layer, fit_experts(layer, config, linear, noise, linear.num_parameters)


def fitted_block(config: BlockConfig, block: Block, noise: float) -> tuple[MuMoEMLP, Fit]:
    """A block of a configuration whose experts equal an MLP's layers."""
    like = block.first.weight
    # on the meta device, a module with parameters would lose their values
    held = nn.Identity() if isinstance(block.act, nn.Module) else block.act
    made = MuMoEMLP.of(config, device="meta", dtype=like.dtype, act=held)
    made = made.to_empty(device=like.device)
    if isinstance(block.act, nn.Module):
        made.act = copied(block.act)
    if made.gate is not None:
        made.gate.reset_parameters()
    ahead = block.ahead
    before = ahead.num_parameters
    if block.up is not None:
        before = block.first.num_parameters + block.up.num_parameters
    first = fit_experts(made.first, config.first, ahead, noise, before)
    second = fit_experts(
        made.second, config.second, block.second, noise, block.second.num_parameters
    )
    return made, Fit.of_block(first, second)


def fresh_block(config: BlockConfig, block: Block, start: str) -> MuMoEMLP:
    """A block of a configuration with initial values, in the dtype and on the device of an MLP."""
    like = block.first.weight
    return MuMoEMLP.of(config, start, like.device, like.dtype, copied(block.act))


def copied(act: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor] | None:
    """An activation with parameters of its own; functions are what they are."""
    return copy.deepcopy(act) if isinstance(act, nn.Module) else act


@torch.no_grad()
def fit_experts(
    layer: Mixture, config: LayerConfig, linear: Linear, noise: float, before: int
) -> Fit:
    """Fill a layer's factors from a linear layer; ``config`` counts the gate that runs it."""
    if config.gate is not None and not config.gate.sums_to_one:
        raise SpecError(
            f"gate must have coefficients that sum to one, so that equal experts stand for the old "
            f"layer; got {config.gate.activation!r}. Use another activation, start from fresh "
            "values, or distill an MLP with tensormoe_torch.mxd.distill."
        )
    like = linear.weight
    wide = torch.float32 if like.dtype.itemsize < 4 else like.dtype
    arrays, error, norm = upcycle(
        replace(config, gate=None),
        like,
        linear.bias,
        BACKEND,
        svd=_svd,
        normal=lambda shape: torch.randn(shape, device=like.device, dtype=wide),
        noise=noise,
    )
    for name, array in arrays.items():
        getattr(layer.factors, name.removeprefix("factors.")).copy_(array)
    return Fit.of_layer(config, error, norm, before, noise)


def _svd(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(table, full_matrices=False)
    return left, values, right
