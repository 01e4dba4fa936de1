"""Layers as state dicts of the paper's released code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensormoe.errors import SpecError
from tensormoe.factorizations import CP, TensorRing, TensorTrain, to_tensorly
from tensormoe.gates import Gate
from tensormoe_torch._layer import MuMoE
from tensormoe_torch._mlp import MuMoEMLP
from tensormoe_torch._pre_normed import PreNormed
from tensormoe_torch.official._layout import ACTIVATIONS, dotted, factor_name


@torch.no_grad()
def to_official(
    layer: MuMoE | MuMoEMLP | PreNormed, *, prefix: str = "", batches: int = 0
) -> dict[str, Tensor]:
    """A layer's arrays as the paper's released code names and lays them out.

    ``load_state_dict`` of the released ``MuMoE`` takes them; :func:`from_official` gives the same
    layer back. Dropout and the gate's activation are not part of a state dict.

    Args:
        layer: CP, tensor ring or tensor train, in one or two levels, with a gate like
            ``Gate.paper()``, or another of its activations; a block with GELU between; a
            :class:`PreNormed` of these with a ``LayerNorm``.
        prefix: put before every name.
        batches: what ``num_batches_tracked`` of a batch norm shall say. The released code counts
            batches and never uses the count; this library does not count.

    Returns:
        Copies by name, on the layer's device. Statistics of batch norm are float32 at least.

    Raises:
        TypeError: another kind of layer.
        SpecError: a layer that the released code has no place for.
    """
    block, norm = (layer.block, layer.norm) if isinstance(layer, PreNormed) else (layer, None)
    if not isinstance(block, MuMoE | MuMoEMLP):
        raise TypeError(
            "layer must be a MuMoE, a MuMoEMLP or a PreNormed; got " + type(layer).__qualname__
        )
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 0:
        raise SpecError(f"batches must be an integer of at least 0; got {batches!r}.")
    misfits = _misfits(block, norm)
    if misfits:
        raise SpecError(
            "the released code has no place for this layer. Convert or retrain it first:\n"
            + "\n".join(misfits)
        )
    state: dict[str, Tensor] = {}
    for index, mixture in enumerate(_layers(block)):
        spec = mixture.spec
        factors = {name: mixture.factors[name] for name in spec.shapes}
        found = to_tensorly(spec.factorization, factors)
        for k, factor in enumerate(found[1] if isinstance(spec.factorization, CP) else found):
            state[factor_name(index, k)] = factor
    if norm is not None:
        state |= {f"input_ln.{name}": array for name, array in norm.named_parameters()}
    gate: Any = block.gate
    levels = range(gate.config.spec.levels)
    state |= {f"projs.{k}": getattr(gate, f"projection_{k}") for k in levels}
    for k in levels if gate.gate.normalization == "batch" else ():
        mean = getattr(gate, f"running_mean_{k}")
        state[f"bn.{k}.running_mean"] = mean
        state[f"bn.{k}.running_var"] = getattr(gate, f"running_variance_{k}")
        state[f"bn.{k}.num_batches_tracked"] = torch.tensor(batches, device=mean.device)
    start = dotted(prefix)
    return {
        start + name: array.detach().clone(memory_format=torch.contiguous_format)
        for name, array in state.items()
    }


def _layers(block: MuMoE | MuMoEMLP) -> tuple[MuMoE, ...]:
    return (block.first, block.second) if isinstance(block, MuMoEMLP) else (block,)


def _stored(mixture: MuMoE) -> str:
    """Kind, rank and bias: the released code gives both layers of a block the same."""
    spec = mixture.spec
    bonds = spec.factorization.bonds(spec.levels)
    kind = "CP"
    if not isinstance(spec.factorization, CP):
        kind = "a ring"
        bonds = (1, *bonds) if isinstance(spec.factorization, TensorTrain) else bonds
    return f"{kind} of rank {bonds} {'with' if spec.bias else 'without'} biases"


def _misfits(block: MuMoE | MuMoEMLP, norm: nn.Module | None) -> list[str]:
    """Properties of a block that the released code cannot hold, one line for each."""
    lines = []
    for index, mixture in enumerate(_layers(block)):
        spec = mixture.spec
        if not isinstance(spec.factorization, CP | TensorRing | TensorTrain):
            lines.append(
                f"layer {index} must be CP, a tensor ring or a tensor train; got "
                f"{spec.factorization!r}"
            )
        if spec.levels > 2:
            lines.append(f"layer {index} must have one or two levels; got {spec.experts}")
    gate = None if block.gate is None else block.gate.gate
    if gate is None:
        lines.append("the layer must have a gate; got none")
    else:
        usual = Gate.paper("batch" if gate.normalization == "batch" else "layer")
        for name in ("normalization", "bias", "spread", "eps", "momentum"):
            wanted, found = getattr(usual, name), getattr(gate, name)
            if wanted != found:
                lines.append(f"{name} of the gate must be {wanted!r}; got {found!r}")
        if gate.activation not in ACTIVATIONS or gate.alpha != 1.5:
            lines.append(f"the gate must be entmax-1.5, sparsemax or softmax; got {gate!r}")
    if isinstance(block, MuMoEMLP):
        if block.config.act_layer != "gelu":
            lines.append(f"act_layer must be 'gelu'; got {block.config.act_layer!r}")
        if block.config.gated:
            lines.append("gated must be False; got True")
        first, second = (_stored(mixture) for mixture in _layers(block))
        if first != second:
            lines.append(f"both layers must be stored alike; got {first} and {second}")
    if norm is not None:
        size = _layers(block)[0].spec.in_features
        wanted_norm = nn.LayerNorm(size, device="meta")
        plain = isinstance(norm, nn.LayerNorm) and repr(norm) == repr(wanted_norm)
        if not plain or norm.bias is None:
            lines.append(f"the norm must be {wanted_norm!r} with a bias; got {norm!r}")
    return lines
