"""Layers from state dicts of the paper's released code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tensormoe import LayerSpec
from tensormoe._validation import choice
from tensormoe.checkpoint import match_arrays
from tensormoe.errors import CheckpointError, SpecError, TensormoeError
from tensormoe.factorizations import CP, Factorization, TensorRing, TensorTrain, from_tensorly
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe.gates import Gate
from tensormoe_torch._layer import MuMoE
from tensormoe_torch._mlp import MuMoEMLP
from tensormoe_torch._pre_normed import PreNormed
from tensormoe_torch.official._layout import ACTIVATIONS, Layout, dotted, factor_name, find_layers

_FACTORIZATIONS = ("cp", "tensor_ring", "tensor_train")


def from_official(
    state: Mapping[str, Tensor],
    *,
    prefix: str = "",
    factorization: str | None = None,
    activation: str = "entmax",
) -> MuMoE | MuMoEMLP | PreNormed:
    """The layer of a state dict that the paper's released code saved, with equal outputs.

    Sizes, levels, ranks, biases and the gate's norm are read from names and shapes. Inputs of two
    axes give outputs of two (the released code gives them a third).

    Args:
        state: arrays by the names of the released code, as ``state_dict()`` returns them.
        prefix: what stands before a layer's names in the state dict of a model, such as
            ``"transformer.h.0.mlp.MuMoE_layer."``; other names are not looked at.
        factorization: what the factors must be, "cp" or "tensor_ring"; "tensor_train" for a ring
            whose outer bond is 1; whatever they are by default.
        activation: of the gate, which a state dict does not tell: "entmax" (with α = 1.5, as in
            the paper), "sparsemax" or "softmax".

    Returns:
        A :class:`MuMoE`; for two layers a :class:`MuMoEMLP` with GELU between; a
        :class:`PreNormed` of either where there is an ``input_ln``. In training mode, with the
        dtype and device of the arrays, which are copied.

    Raises:
        CheckpointError: something is missing, unknown, of another shape, dtype or device; the
            message lists every difference.
        SpecError: an unknown name of a factorization or an activation.
        TypeError: ``state`` is no mapping.

    >>> from tensormoe import Gate
    >>> from tensormoe_torch import MuMoE, to_official
    >>> layer = MuMoE(8, 4, experts=3, rank=2, gate=Gate.paper())
    >>> state = to_official(layer)
    >>> [(name, tuple(array.shape)) for name, array in state.items()]
    [('MuMoE.factors.0', (3, 2)), ('MuMoE.factors.1', (9, 2)), ('MuMoE.factors.2', (4, 2)),
     ('projs.0', (8, 3))]
    >>> from_official(state)
    MuMoE(8, 4, experts=3, factorization=CP(rank=2), bias=True, gate=Gate(activation='entmax', \
alpha=1.5, normalization='layer', k=None, bias=False, spread=1.0, eps=1e-05, momentum=0.1, \
noise=0.0, balance=0.0), dtype=torch.float32)
    """
    choice(activation, ACTIVATIONS, "activation", SpecError)
    if factorization is not None:
        choice(factorization, _FACTORIZATIONS, "factorization", SpecError)
    arrays = _arrays(state, prefix)
    layout = Layout.of(arrays, None if factorization is None else factorization != "cp")
    outer = {layout.bond(0): 1} if factorization == "tensor_train" else {}
    sizes = layout.sizes(arrays, outer)
    _check(layout, sizes, arrays, prefix)
    try:
        configs = _configs(layout, sizes, factorization == "tensor_train", activation)
        block = _block(layout, configs, arrays)
    except TensormoeError as error:  # a size of zero, or a dtype that no layer has
        raise CheckpointError(f"the arrays make no layer: {error}") from error
    return _with_norm(block, arrays) if layout.input_norm else block


def _arrays(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The arrays under a prefix, without it."""
    if not isinstance(state, Mapping):
        raise TypeError(
            "state must be a mapping from names to tensors, as state_dict() returns it; got "
            f"{type(state).__qualname__}."
        )
    start = dotted(prefix)
    arrays = {
        name.removeprefix(start): array
        for name, array in state.items()
        if isinstance(name, str) and name.startswith(start)
    }
    others = [f"{name!r}: {type(a).__qualname__}" for name, a in arrays.items() if not _is_dense(a)]
    if others:
        raise CheckpointError("arrays must be dense tensors; got\n" + "\n".join(others))
    if "projs.0" not in arrays:
        names = {name: None for name in state if isinstance(name, str)}
        found = ", ".join(repr(each) for each in find_layers(names)) or "none"
        raise CheckpointError(
            f"a layer of the released code has a gate 'projs.0'; got none under prefix {prefix!r}. "
            f"Prefixes with one: {found}."
        )
    return arrays


def _is_dense(array: object) -> bool:
    return isinstance(array, Tensor) and array.layout == torch.strided


def _check(
    layout: Layout, sizes: Mapping[str, int], arrays: Mapping[str, Tensor], prefix: str
) -> None:
    """Every array must be there, in the shape, dtype and on the device that the others imply."""
    expected = {
        name: tuple(sizes.get(axis, -1) for axis in axes) for name, axes in layout.axes().items()
    }
    match = match_arrays(expected, arrays, strict=False)
    differences = [] if match.exact else [match.describe()]
    model = arrays["projs.0"]
    for name, array in match.arrays.items():
        if array.device != model.device:
            differences.append(f"{name!r} must be on {model.device}; got {array.device}")
        if name.endswith("num_batches_tracked"):
            fits, wanted = not (array.is_floating_point() or array.is_complex()), "integers"
        elif name.startswith("bn."):
            fits, wanted = array.is_floating_point(), "floating point"
        else:
            fits, wanted = array.dtype == model.dtype, f"{model.dtype}, as 'projs.0'"
        if not fits:
            differences.append(f"{name!r} must be {wanted}; got {array.dtype}")
    if differences:
        kind = "tensor ring" if layout.ring else "CP"
        raise CheckpointError(
            f"the arrays under prefix {prefix!r} must be those of a {kind} layer with "
            f"{layout.levels} level(s) of experts; -1 is a size that no array tells. "
            "Differences:\n" + "\n".join(differences)
        )


def _configs(
    layout: Layout, sizes: Mapping[str, int], train: bool, activation: str
) -> list[LayerConfig]:
    """One configuration a layer; the first has the gate."""
    usual = Gate.paper("batch" if layout.batch_norm else "layer")
    gate = replace(usual, activation=activation)
    experts = tuple(sizes[f"n{level}"] for level in range(layout.levels))
    modes = ["in", "hidden", "out"] if layout.layers == 2 else ["in", "out"]
    bonds = tuple(sizes[layout.bond(index)] for index in range(layout.levels + 2))
    factorization: Factorization = CP(bonds[0])
    if layout.ring:
        factorization = TensorTrain(bonds[1:]) if train else TensorRing(bonds)
    configs = []
    for layer in range(layout.layers):
        source, target = (sizes[mode] for mode in modes[layer : layer + 2])
        spec = LayerSpec(source, target, experts, factorization, sizes["in+"] > sizes["in"])
        configs.append(LayerConfig(spec, None if layer else gate))
    return configs


def _block(
    layout: Layout, configs: list[LayerConfig], arrays: Mapping[str, Tensor]
) -> MuMoE | MuMoEMLP:
    named: dict[str, Tensor] = {}
    for layer, config in enumerate(configs):
        names = (factor_name(layer, k) for k in range(layout.levels + 2))
        listed = [arrays[name].detach() for name in names]
        found = listed if layout.ring else (None, listed)
        spec = config.spec
        factors = from_tensorly(spec.factorization, found, bias=spec.bias)
        start = ("first.", "second.")[layer] if layout.layers == 2 else ""
        named |= {f"{start}factors.{name}": array for name, array in factors.items()}
    for level in range(layout.levels):
        named[f"gate.projection_{level}"] = arrays[f"projs.{level}"]
        if layout.batch_norm:
            named[f"gate.running_mean_{level}"] = arrays[f"bn.{level}.running_mean"]
            named[f"gate.running_variance_{level}"] = arrays[f"bn.{level}.running_var"]
    device = arrays["projs.0"].device
    if layout.layers == 1:
        return MuMoE._filled(configs[0], named, device, "paper")
    both = BlockConfig(configs[0], configs[1], "gelu")
    return MuMoEMLP._filled(both, named, device, "paper")


def _with_norm(block: MuMoE | MuMoEMLP, arrays: Mapping[str, Tensor]) -> PreNormed:
    made = PreNormed(block)
    made.norm.load_state_dict({name: arrays[f"input_ln.{name}"] for name in ("weight", "bias")})
    return made
