"""Adapters added to a model, in place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tensormoe.errors import SpecError
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import Options
from tensormoe.gates import Gate
from tensormoe.mixtures import ResidualConfig, residual_config
from tensormoe.selection import Budget
from tensormoe_torch._hooks import TABLES
from tensormoe_torch._hub import mark
from tensormoe_torch.adapters._experts import adapted
from tensormoe_torch.adapters._find import find_targets
from tensormoe_torch.adapters._report import AdapterReport, AddedAdapter
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._find import holds_experts
from tensormoe_torch.mixtures import ResidualExperts
from tensormoe_torch.mixtures._residual import own_sizes
from tensormoe_torch.surgery._linears import is_linear
from tensormoe_torch.surgery._replace import at, num_parameters, swap
from tensormoe_torch.surgery._select import Select
from tensormoe_torch.surgery._surroundings import leave_fused_paths

Planned = Mapping[str, Mapping[str, ResidualConfig]]
"""Adapters by the name of a module and, of experts, the role; the role of a layer is ``""``."""


def add_adapters(
    model: nn.Module,
    select: Select | None = None,
    *,
    experts: int | tuple[int, ...] | None = None,
    factorization: FactorizationLike = "cp",
    rank: int | tuple[int, ...] | None = None,
    budget: Budget | int | str | None = None,
    bias: bool = False,
    gate: Gate | str | None = "entmax",
    scale: float = 1.0,
    init: str = "variance",
    dtype: torch.dtype | None = None,
) -> tuple[nn.Module, AdapterReport]:
    """Add mixtures of low-rank experts to layers of a model, in place, and freeze all else.

    A linear layer becomes :class:`ResidualExperts` with a gate of its own. Of a sparse model's
    experts, every projection W_n becomes W_n + ΔW_n, chosen by the model's own router, and all ΔW_n
    of a role are one tensor network: experts share what they learn, so that the rank may be smaller
    than their number. Found are the experts that :func:`compress` finds, stacks and lists, and
    those of the library (:class:`SparseMoE`, :class:`SoftMoE`, compressed ones). Stacked parameters
    stay where they are in memory; a list of experts, and gates and ups that take turns in one
    parameter, are copied.

    Outputs stay what they were until a step is made: exactly, and to rounding where other code ran
    the experts, whose sums have another order. Either all that is selected is
    changed, or nothing is and an error says why. Make optimizers afterwards.

    Args:
        model: any module that holds the layers.
        select: which linear layers and experts, as for :func:`replace`: patterns, a class, or a
            function of name and module. All experts by default, and no linear layers.
        experts: N of linear layers, or one size per level; the model's own experts have theirs.
        factorization: a value such as ``CP(rank=8)``, or its name.
        rank: bond sizes, with a name.
        budget: upper limits for each mixture with its gate instead, as for :class:`MuMoE`. Without
            rank or budget, factors get the parameters of one linear layer of the size.
        bias: whether the mixtures have biases.
        gate: of linear layers; the model's own experts have a router.
        scale: what the outputs of mixtures are multiplied by; PEFT's ``lora_alpha`` is
            ``scale=lora_alpha / rank``.
        init: ``"variance"`` or ``"paper"``, of the factors that do not start at zero.
        dtype: of the mixtures; that of each layer by default.

    Returns:
        The model itself, and what was added; ``print`` it for a table.

    Raises:
        SpecError: a selection that matches nothing or something else, linear layers without
            ``experts``, what has an adapter already, or arguments that cannot be.
        ShapeError: experts of different shapes.
        RankError, BudgetError: as :class:`ResidualExperts`, with the name of the module.

    >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> model, report = add_adapters(model, "0", experts=4, rank=2)
    >>> report.names, report.parameters, type(model[0]).__name__
    (('0',), 136, 'ResidualExperts')
    """
    chosen = find_targets(model, select)
    options = Options(1 if experts is None else experts, factorization, rank, budget, bias, gate)
    planned: dict[str, dict[str, ResidualConfig]] = {}
    made: dict[int, nn.Module] = {}
    for name, module in chosen.items():
        with at(name):
            if is_linear(module):
                if experts is None:
                    raise SpecError(
                        "experts must be given for linear layers; got None. Pass experts=4, for "
                        "instance."
                    )
                planned[name] = {"": residual_config(module, *own_sizes(module), options, scale)}
                continue
            held = _experts_of(module, name, made)
        planned[name] = {}
        layers: dict[str, Any] = dict(held.projections.items())
        for role, each in layers.items():
            with at(f"{name}.projections.{role}"):
                own = Options(each.spec.experts, factorization, rank, budget, bias, None)
                planned[name][role] = residual_config(each, None, None, own, scale)
    return model, install(model, chosen, planned, made, init, dtype)


def freeze(model: nn.Module) -> nn.Module:
    """Let the adapters of a model train, and nothing else.

    :func:`add_adapters` does it, and so does loading; call this for adapters that were put in by
    hand.

    Args:
        model: holds :class:`ResidualExperts`.

    Returns:
        The model itself.

    Raises:
        SpecError: a model without adapters.
    """
    adapters = adapters_of(model)
    model.requires_grad_(False)
    for each in adapters.values():
        each.adapter.requires_grad_(True)
    return model


def adapters_of(model: nn.Module) -> dict[str, ResidualExperts]:
    """The layers of a model that have an adapter, by name; none that is inside another's base.

    Raises:
        SpecError: there are none.
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be an nn.Module; got {type(model).__name__}.")
    found: dict[str, ResidualExperts] = {}
    for name, each in model.named_modules():
        outer = any(name.startswith(f"{other}." if other else "") for other in found)
        if isinstance(each, ResidualExperts) and not outer:
            found[name] = each
    if not found:
        raise SpecError(
            f"the model must have adapters; {type(model).__name__} has none. Call add_adapters "
            "first."
        )
    return found


def install(
    model: nn.Module,
    chosen: Mapping[str, nn.Module],
    planned: Planned,
    made: dict[int, nn.Module],
    init: str = "variance",
    dtype: torch.dtype | None = None,
) -> AdapterReport:
    """Put planned adapters into a model.

    Args:
        model: it holds the modules.
        chosen: the modules by name.
        planned: their adapters.
        made: experts that are read already, by the identity of the module.
        init: of the factors.
        dtype: of the mixtures.
    """
    count = num_parameters(model)
    kinds = {name: type(module).__name__ for name, module in chosen.items()}
    added: list[AddedAdapter] = []
    placed: list[tuple[FactorizedExperts, str, ResidualExperts]] = []
    # a module that is used in several places is wrapped once
    first = {id(module): name for name, module in reversed([*chosen.items()])}
    with _flags_kept(model):
        for name in sorted(first.values(), key=[*chosen].index):
            module = chosen[name]
            held = made.get(id(module), module)
            for role, config in planned[name].items():
                layers = held.projections if isinstance(held, FactorizedExperts) else {"": module}
                wrapped = ResidualExperts.of(config, layers[role], init, dtype=dtype)
                if isinstance(held, FactorizedExperts):
                    placed.append((held, role, wrapped))
                else:
                    made[id(module)] = wrapped
                path = f"{name}.projections.{role}" if role else name
                entries = num_parameters(wrapped.base)
                added.append(AddedAdapter(path, kinds[name], config, entries))
    for held, role, wrapped in placed:
        held.projections[role] = wrapped
        held.plan_ahead()
    for name, old in chosen.items():
        new = made.get(id(old), old)
        if new is old:
            new.train(old.training)
            continue
        swap(model, name, old, new)
    for old in chosen.values():
        if made.get(id(old), old) is not old:
            # those of a base would be called twice
            vars(old).update({table: OrderedDict() for table in TABLES if table in vars(old)})
    leave_fused_paths(model, chosen)
    freeze(model)
    mark(model)
    return AdapterReport(tuple(added), count)


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """Parameters are trained, and modules in training, as before if the body fails."""
    trained = [(each, each.requires_grad) for each in model.parameters()]
    modes = [(each, each.training) for each in model.modules()]
    try:
        yield
    except BaseException:
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        raise


def _experts_of(module: nn.Module, name: str, made: dict[int, nn.Module]) -> FactorizedExperts:
    """Experts whose projections are layers of the library."""
    if isinstance(module, FactorizedExperts):
        return module
    assert holds_experts(module)
    found = made.get(id(module)) or adapted(module, name)
    made[id(module)] = found
    assert isinstance(found, FactorizedExperts)
    return found
