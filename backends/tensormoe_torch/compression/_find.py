"""Experts in a model, recognized by the parameters that they hold."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from tensormoe.checkpoint._model_config import PROJECTION_NAMES
from tensormoe.errors import SpecError
from tensormoe.factorizations import Dense
from tensormoe.mixtures import MixtureConfig, SparseConfig
from tensormoe_torch._layer import MuMoE
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.surgery._linears import is_linear
from tensormoe_torch.surgery._select import Select, nearby, select_modules


def is_stacked(module: nn.Module) -> bool:
    """Whether it holds the weights of all experts in two parameters of three axes."""
    held = module._parameters
    first = held.get("gate_up_proj", held.get("up_proj"))
    return all(each is not None and each.ndim == 3 for each in (first, held.get("down_proj")))


# names of what experts are called with: all together, in transformers
_ROUTED = (
    ["hidden_states", "top_k_index", "top_k_weights"],
    ["hidden_states", "router_indices", "routing_weights"],
)


def takes_routing(module: nn.Module) -> bool:
    """Whether experts are called together, with tokens, indices and weights."""
    return _arguments(module) in _ROUTED


def takes_blocks(module: nn.Module) -> bool:
    """Whether experts are called together with tokens alone, an equal block for each in turn."""
    return _arguments(module) == _ROUTED[0][:1]


def _arguments(module: nn.Module) -> list[str]:
    return [*inspect.signature(type(module).forward).parameters][1:]


def is_dense(name: str, module: nn.Module, model: nn.Module) -> bool:
    """Whether it is a module of ours whose experts are dense, and may be replaced where it is.

    Of mixtures that is the sparse one by itself, whose configuration can follow.
    """
    # those with adapters hold another model's experts
    if not name or type(module) is not FactorizedExperts:
        return False
    layers: list[Any] = [*module.projections.values()]
    kinds = [layer.spec.factorization for layer in layers if isinstance(layer, MuMoE)]
    if len(kinds) < len(layers) or any(each.name != Dense.name for each in kinds):
        return False
    configs = [getattr(each, "config", None) for each in above(model, name)]
    *others, parent = configs
    if any(isinstance(each, MixtureConfig) for each in others):
        return False
    leaf = name.rpartition(".")[2]
    return not isinstance(parent, MixtureConfig) or (
        isinstance(parent, SparseConfig) and leaf == "experts"
    )


def above(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that a module lies in, the model first."""
    parts = name.split(".")
    for count in range(len(parts)):
        yield model.get_submodule(".".join(parts[:count]))


def linears_by_role(expert: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of one expert by role; empty if these are no expert's.

    An expert without a gate has an up and a down projection alone.
    """
    children = {name: each for name, each in expert.named_children() if is_linear(each)}
    found = {
        role: children[name]
        for role, names in PROJECTION_NAMES.items()
        for name in names
        if name in children
    }
    complete = {"up_proj", "down_proj"} <= found.keys() and len(found) == len(children)
    return found if complete else {}


def find_experts(model: nn.Module, select: Select | None) -> dict[str, nn.Module]:
    """The experts that are meant, by name.

    Args:
        model: it holds them.
        select: as for ``replace``; a function is asked about modules with experts alone. None for
            all of them; lists of modules count if they, or the class of what they hold, have
            "expert" in their name.

    Raises:
        SpecError: a model without any, or a selection that matches nothing or something else.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    every = {
        name: each
        for name, each in modules.items()
        if holds_experts(each) or is_dense(name, each, model)
    }
    if select is None:
        found = {
            name: each
            for name, each in every.items()
            if not isinstance(each, nn.ModuleList) or is_named(name, each)
        }
        if not found:
            raise SpecError(
                f"the model must hold experts; {type(model).__name__} has none that are known"
                f"{_hint(*modules.values())}: "
                "stacks in parameters gate_up_proj and down_proj, as transformers 5 has them, or "
                "an nn.ModuleList of equal experts of nn.Linear layers gate_proj, up_proj and "
                "down_proj, or w1, w3 and w2, or dense experts of a SparseMoE. Select a list of "
                "another name with select=…"
            )
        return select_modules(model, lambda name, _: name in found)
    if callable(select) and not isinstance(select, (type, nn.Module)):
        asked = select
        return select_modules(model, lambda name, each: name in every and asked(name, each))
    chosen = select_modules(model, select)
    for name, module in chosen.items():
        if name not in every:
            raise SpecError(_no_experts(name, module, every))
    return chosen


def _hint(*modules: nn.Module) -> str:
    """Note on experts of the library, for a message."""
    if not any(isinstance(each, FactorizedExperts) for each in modules):
        return ""
    return (
        " (is tensormoe's already: merge_adapters gives a model with adapters its own experts back)"
    )


def holds_experts(module: nn.Module) -> bool:
    """Whether it is a stack of experts, or a list of them."""
    return is_stacked(module) or _is_list(module)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and any(linears_by_role(each) for each in module)


def is_named(name: str, module: nn.Module) -> bool:
    """Whether a list, or the class of what it holds, has "expert" in its name."""
    children: Any = module
    names = [name.rpartition(".")[2], type(module).__name__, *(type(c).__name__ for c in children)]
    return any("expert" in each.lower() for each in names)


def _no_experts(name: str, module: nn.Module, every: Mapping[str, nn.Module]) -> str:
    inside = [each for each in every if each.startswith(f"{name}.")]
    hint = f" It holds {', '.join(map(repr, inside[:3]))}." if inside else nearby(name, every)
    if held := _hint(module):
        hint = f" What is there{held}."
    return (
        f"what is selected must be experts: stacks gate_up_proj and down_proj, or an nn.ModuleList "
        f"of experts of linear layers; {name!r} is a {type(module).__name__}.{hint}"
    )
