"""Layers and experts of a model that adapters can be added to."""

from __future__ import annotations

from torch import nn

from tensormoe.errors import SpecError
from tensormoe_torch._layer import MuMoE
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._find import holds_experts, is_named, is_stacked
from tensormoe_torch.mixtures import ResidualExperts
from tensormoe_torch.surgery._linears import is_linear
from tensormoe_torch.surgery._select import Select, nearby, select_modules
from tensormoe_torch.surgery._surroundings import check_surroundings


def find_targets(model: nn.Module, select: Select | None) -> dict[str, nn.Module]:
    """The linear layers and the experts that are meant, by name.

    Args:
        model: it holds them.
        select: as for :func:`replace`; None for all experts that are called together.

    Raises:
        SpecError: nothing found, or a selection that holds something else, or what has an adapter.
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be an nn.Module; got {type(model).__name__}.")
    modules = dict(model.named_modules(remove_duplicate=False))
    if select is None:
        found = {name for name, each in modules.items() if name and _is_experts(name, each)}
        if not found:
            raise SpecError(
                f"the model must hold experts, or select=… say which linear layers are meant; "
                f"{type(model).__name__} has no experts that are known. Pass select='**.q_proj', "
                "for instance, and experts=…."
            )
        chosen = select_modules(model, lambda name, _: name in found)
    else:
        chosen = select_modules(model, select)
    for name, module in chosen.items():
        _check(name, module, modules)
    # experts of the library stay; what is around them is no matter
    check_surroundings(model, {n: m for n, m in chosen.items() if holds_experts(m)})
    for name in chosen:
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise SpecError(
                f"{name!r} can't have an adapter: nn.MultiheadAttention reads its weights and "
                "never calls it. Leave it out of the selection."
            )
    return chosen


def has_adapters(module: nn.Module) -> bool:
    """Whether a module holds :class:`ResidualExperts`, or is one."""
    return any(isinstance(each, ResidualExperts) for each in module.modules())


def _is_experts(name: str, module: nn.Module) -> bool:
    if isinstance(module, FactorizedExperts) or is_stacked(module):
        return True
    return holds_experts(module) and is_named(name, module)


def _check(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> None:
    if has_adapters(module) or _inside(name, modules):
        raise SpecError(
            f"{name!r} has an adapter already. Merge it first, with merge_adapters or merge(), or "
            "leave it out of the selection."
        )
    if isinstance(module, FactorizedExperts):
        others = [role for role, each in module.projections.items() if not isinstance(each, MuMoE)]
        if others:
            raise SpecError(
                f"projections of experts must be MuMoE layers; {others[0]!r} of {name!r} is not."
            )
        return
    if not is_linear(module) and not holds_experts(module):
        fitting = [n for n, each in modules.items() if is_linear(each) or holds_experts(each)]
        inside = [each for each in fitting if each.startswith(f"{name}.")]
        hint = f" It holds {', '.join(map(repr, inside[:3]))}." if inside else nearby(name, fitting)
        raise SpecError(
            "adapters are for linear layers, stacks or lists of experts, and experts of the "
            f"library; {name!r} is a {type(module).__name__}.{hint} Put ResidualExperts around "
            "another module by hand."
        )


def _inside(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a module around it is one with an adapter."""
    parts = name.split(".")
    outer = (".".join(parts[:count]) for count in range(1, len(parts)))
    return any(isinstance(modules.get(each), ResidualExperts) for each in outer)
