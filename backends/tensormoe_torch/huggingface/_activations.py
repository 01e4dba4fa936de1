"""Activations by name, so that files can store them without code."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from tensormoe.errors import SpecError
from tensormoe.mixtures import gate_of, gated
from tensormoe_torch._activations import ACTIVATIONS, halves
from tensormoe_torch.compression._experts import Activation
from tensormoe_torch.compression._gate import Own, has_own_gate, own_activation


def name_of(act: Activation) -> str | None:
    """The name of an activation; None for the one that experts of transformers have of their own.

    Raises:
        SpecError: it has no name.
    """
    if isinstance(act, Own):
        return None
    # gate and up projection as one: the activation of the first half
    inner = gate_of(act)
    if inner is not None:
        return name_of(inner)
    for name, function in ACTIVATIONS.items():
        if act is function:
            return name
    if isinstance(act, nn.Module) and not [*act.parameters(), *act.buffers()]:
        values = torch.cat([torch.linspace(-8.0, 8.0, 257), torch.tensor([-512.0, 512.0])])
        for name, kind in dict.items(ACT2FN):
            if type(act) is (kind[0] if isinstance(kind, tuple) else kind) and torch.equal(
                act(values), ACT2FN[name](values)
            ):
                return str(name)
    raise SpecError(
        "the activation must be one of those of tensormoe_torch.MuMoEMLP or of "
        f"transformers.activations.ACT2FN to be saved by name; got {act!r:.80}. Save the model's "
        "state_dict() instead."
    )


def activation_of(name: object, old: nn.Module, fused: bool) -> Activation:
    """The activation of experts.

    Args:
        name: its name; None for the one of the experts that are replaced.
        old: those experts, as transformers makes them.
        fused: whether gate and up projection are one.

    Raises:
        SpecError: an unknown name, or experts without an activation that can be found.
    """
    first = next(old.children(), old) if isinstance(old, nn.ModuleList) else old
    if fused and name is None and first is old:
        return Own(old)
    if fused and has_own_gate(old):
        raise SpecError(
            f"{type(old).__name__} gate in a way of their own, which no name stands for; act must "
            f"be null; got {name!r:.80}."
        )
    if has_own_gate(old):
        raise SpecError(
            f"{type(old).__name__} gate in a way of their own, which takes gate and up projection "
            "as one layer; got two. Compress such a model in place, with --gate-up joined, or with "
            "--dense."
        )
    found = own_activation(first) if name is None else act_of(name)
    if found is None:
        raise SpecError(f"{type(first).__name__} must have an activation; it shows none.")
    return gated(found, halves) if fused else found


def act_of(name: object) -> Activation:
    """The activation of a name that :func:`name_of` gives.

    Raises:
        SpecError: an unknown name, or one of an activation with parameters.
    """
    if isinstance(name, str) and name in ACTIVATIONS:
        return ACTIVATIONS[name]
    if isinstance(name, str) and name in dict.keys(ACT2FN):
        act: nn.Module = ACT2FN[name]
        if not [*act.parameters()]:
            return act
    raise SpecError(f"act must be the name of an activation; got {name!r:.80}.")
