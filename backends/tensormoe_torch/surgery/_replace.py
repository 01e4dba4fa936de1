"""Linear layers and MLP blocks of a model, replaced in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any

from torch import Tensor, nn

from tensormoe._validation import choice, positive_int
from tensormoe.errors import BudgetError, SpecError, TensormoeError, located
from tensormoe.factorizations import INITIALIZATIONS, FactorizationLike
from tensormoe.functional import BlockConfig, Fit, LayerConfig, Options, checked_noise
from tensormoe.gates import Gate
from tensormoe.planning import PUBLISHED_ROOFLINES, Cost, Roofline
from tensormoe.selection import Allocation, Budget, linear_cost
from tensormoe_torch._hooks import move_hooks
from tensormoe_torch._hub import mark
from tensormoe_torch._layer import MuMoE
from tensormoe_torch._mlp import MuMoEMLP
from tensormoe_torch.surgery._allocated import (
    allocated_modules,
    check_alone,
    layer_of,
    options_of,
)
from tensormoe_torch.surgery._block import Block, read_block
from tensormoe_torch.surgery._convert import (
    block_config,
    fitted_block,
    fitted_layer,
    fresh_block,
    layer_config,
)
from tensormoe_torch.surgery._inputs import count_inputs
from tensormoe_torch.surgery._linears import Linear, is_linear, read_linear
from tensormoe_torch.surgery._report import Replacement, Surgery
from tensormoe_torch.surgery._select import Select, nearby, select_modules
from tensormoe_torch.surgery._surroundings import check_surroundings, leave_fused_paths
from tensormoe_torch.surgery._trial import all_or_nothing, try_out

_STARTS = ("weights", *INITIALIZATIONS)


def replace(
    model: nn.Module,
    select: Select | Allocation,
    *,
    experts: int | tuple[int, ...] | None = None,
    factorization: FactorizationLike | tuple[FactorizationLike, FactorizationLike] = "cp",
    rank: int | tuple[int, ...] | None = None,
    budget: Budget | int | str | None = None,
    gate: Gate | str | None = "entmax",
    noise: float = 0.1,
    start: str = "weights",
    drop: float | None = None,
    batch: int | None = None,
    example: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    training: bool = False,
    roofline: Roofline | str = "cpu",
) -> Surgery:
    """Replace linear layers and MLP blocks of a model by mixtures of experts, in place.

    A new layer has the dtype, the device, the mode, the hooks and the ``requires_grad`` of the one
    whose place it takes. Everything else stays as it is. Either all that is selected is replaced,
    or nothing is and an error says why. With an ``example``, the model is run afterwards as well,
    and if it fails, the surgery is undone. Make optimizers afterwards: they hold parameters.

    Args:
        model: any module that holds the layers.
        select: which ones: a pattern on names or several of them, in which ``*`` stands for one
            part of a dotted name and ``**`` for any number of parts ("**.mlp"); a class of modules;
            or a function of name and module. All that it selects must be linear layers or MLPs as
            :func:`from_linear` and :func:`from_mlp` take them, none inside another. Or a
            :class:`tensormoe.selection.Allocation` of linear layers and MLPs, which has
            the experts, the factorizations with their ranks, and the gate of each.
        experts: N, or one size per level of hierarchy; to be given unless with an allocation.
        factorization: a value such as ``CP(rank=64)``, a name, or, for blocks, a pair of them.
        rank: bond sizes, with a name.
        budget: upper limits for each layer or block with its gate instead, as for
            :class:`MuMoE` and :class:`MuMoEMLP`; ``"linear"`` stands for the parameters of what is
            replaced. Without rank or budget the factors get those, and the gate comes on top.
        gate: how inputs become coefficients.
        noise: how far experts start from the old weights, relative to them. It sums to zero over
            the experts, so that outputs with a fresh gate stay those of the old layer; without any,
            experts would get equal gradients and never part.
        start: ``"weights"`` to start from the old weights; ``"variance"`` or ``"paper"`` for fresh
            values as in :class:`MuMoE`.
        drop: dropout of blocks; by default their own.
        batch: how many inputs each layer gets, in the report; 1024 by default.
        example: instead of ``batch``, an input of the model (a tuple or a mapping are its
            arguments). The model runs it in evaluation mode without gradients: before, to see how
            many inputs each layer gets, and afterwards, to see whether code around the layers gets
            along with the new ones.
        training: whether the report's costs are those of forward and backward.
        roofline: the device that the report predicts times for, or the name of a published one.

    Returns:
        What was replaced, with costs before and after; ``print`` it for a table.

    Raises:
        SpecError: a selection that matches nothing or something else than linear layers and MLPs,
            weights that are used in other places too, arguments that cannot be, or a model that
            does not run the example with the new layers; the message says what it read.
        RankError, BudgetError: as :class:`MuMoE`, with the name of the module; an impossible
            budget's message says what is the smallest feasible one.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> surgery = replace(model, "0", experts=16, batch=256)
    >>> surgery.names, surgery.before.parameters, type(model[0]).__name__
    (('0',), 576, 'MuMoE')
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be an nn.Module; got {type(model).__name__}.")
    start = choice(start, _STARTS, "start", SpecError)
    noise = checked_noise(noise)
    device = _roofline(roofline)
    if batch is not None and example is not None:
        raise SpecError(f"batch and example exclude one another; got batch={batch!r}. Drop one.")
    rows = positive_int(1024 if batch is None else batch, "batch")
    if isinstance(select, Allocation):
        own = None if factorization == "cp" else factorization, None if gate == "entmax" else gate
        given = {"experts": experts, "rank": rank, "budget": budget}
        check_alone("replace", {**given, "factorization": own[0], "gate": own[1]})
        chosen = allocated_modules(model, select, ("linear", "mlp"), "compress")
    else:
        if experts is None:
            raise SpecError("experts must be given; got None. Give N, or one size per level.")
        chosen = select_modules(model, select)
    sources = {name: _read(name, module, model, start) for name, module in chosen.items()}
    check_surroundings(model, chosen)
    configs = {}
    for name, source in sources.items():
        if isinstance(select, Allocation):
            first = next(key for key in select.names if chosen[key] is chosen[name])
            options = options_of(layer_of(select, first, _projections(source)))
        else:
            assert experts is not None
            options = Options(experts, factorization, rank, budget, gate=gate)
        configs[name] = _config(name, source, options, drop)
    # a module that is used in several places is replaced by one
    names = list({id(module): name for name, module in reversed(chosen.items())}.values())[::-1]
    if example is None:
        inputs = dict.fromkeys(names, rows)
    else:
        widths = {name: sources[name].sizes[0] for name in names}
        inputs = count_inputs(model, {name: chosen[name] for name in names}, widths, example)

    count = num_parameters(model)
    made: dict[int, nn.Module] = {}
    replacements = []
    for name in names:
        old, source = chosen[name], sources[name]
        new, fit = _make(source, configs[name], start, noise)
        made[id(old)] = new
        before = _cost(source, inputs[name], training)
        after = new.cost(inputs[name], training=training)
        replacements.append(
            Replacement(name, type(old).__name__, source.sizes, inputs[name], before, after, fit)
        )
    with all_or_nothing(model, chosen, names):
        for name, old in chosen.items():
            swap(model, name, old, made[id(old)])
        leave_fused_paths(model, chosen)
        if example is not None:
            try_out(model, example)
    mark(model)
    return Surgery(tuple(replacements), (count, num_parameters(model)), device, bool(training))


def _projections(source: Linear | Block) -> dict[str, tuple[int, int]]:
    """Sizes of what is built, by role."""
    if isinstance(source, Linear):
        return {"": source.sizes}
    rows, hidden, columns = source.sizes
    wide = hidden if source.up is None else 2 * hidden
    return {"first": (rows, wide), "second": (hidden, columns)}


def _roofline(roofline: Roofline | str) -> Roofline:
    if isinstance(roofline, Roofline):
        return roofline
    return PUBLISHED_ROOFLINES[choice(roofline, PUBLISHED_ROOFLINES, "roofline", BudgetError)]


def _read(name: str, module: nn.Module, model: nn.Module, start: str) -> Linear | Block:
    values = start == "weights"
    if is_linear(module):
        return read_linear(module, repr(name), values)
    try:
        return read_block(module, repr(name), values)
    except SpecError as error:
        inside = [key for key, each in module.named_modules(prefix=name) if is_linear(each)]
        others = [key for key, each in model.named_modules() if is_linear(each)]
        hint = f" It holds {', '.join(map(repr, inside[:3]))}." if inside else nearby(name, others)
        raise SpecError(f"{error}{hint}") from error


@contextmanager
def at(name: str) -> Iterator[None]:
    """Errors say at which module."""
    try:
        yield
    except TensormoeError as error:
        raise located(error, f"at {name!r}") from error


def _config(
    name: str, source: Linear | Block, options: Options, drop: float | None
) -> LayerConfig | BlockConfig:
    with at(name):
        if isinstance(source, Linear):
            return layer_config(source, options)
        return block_config(source, options, drop, repr(name))


def _make(
    source: Linear | Block, config: LayerConfig | BlockConfig, start: str, noise: float
) -> tuple[MuMoE | MuMoEMLP, Fit | None]:
    if isinstance(source, Linear):
        assert isinstance(config, LayerConfig)
        if start == "weights":
            return fitted_layer(config, source, noise)
        like = source.weight
        return MuMoE.of(config, start, like.device, like.dtype), None
    assert isinstance(config, BlockConfig)
    if start == "weights":
        return fitted_block(config, source, noise)
    return fresh_block(config, source, start), None


def _cost(source: Linear | Block, inputs: int, training: bool) -> Cost:
    if isinstance(source, Block):
        return reduce(Cost.then, (_cost(each, inputs, training) for each in source.linears))
    return linear_cost(
        *source.sizes,
        inputs,
        bias=source.bias is not None,
        training=training,
        itemsize=source.weight.dtype.itemsize,
    )


def num_parameters(model: nn.Module) -> int:
    """Trainable entries and frozen ones, tied parameters counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, tied ones counted once."""
    held = (*model.parameters(), *model.buffers())
    return sum(each.numel() * each.element_size() for each in held)


def swap(model: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` where ``old`` was, with its mode, flags and hooks."""
    new.train(old.training)
    new.requires_grad_(any(parameter.requires_grad for parameter in old.parameters()))
    move_hooks(old, new)
    parent, _, leaf = name.rpartition(".")
    # under the name it had, so that the order of modules stays
    model.get_submodule(parent).register_module(leaf, new)
