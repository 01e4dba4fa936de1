"""Layers of a model by names and sizes alone, so that models on the meta device have them too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from tensormoe.errors import SpecError
from tensormoe.selection import LayerSite, Projection
from tensormoe.selection._config_sites import chosen_parts
from tensormoe.selection._model_sites import checked_parts
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._find import holds_experts, is_dense, is_named, linears_by_role
from tensormoe_torch.compression._read import stack_projections
from tensormoe_torch.surgery._linears import Linear, is_linear, read_linear

_MLPS = ("mlp", "ffn", "feedforward", "feed_forward", "expert", "denseact")
_ATTENTION = ("attn", "attention")
_HEADS = ("lm_head", "classifier", "score", "head", "heads")

Found = Iterator[tuple[str, LayerSite]]


def model_sites(model: nn.Module, what: str | Sequence[str] | None = None) -> tuple[LayerSite, ...]:
    """Layers of a model that factors can take the place of, by names and sizes alone.

    Nothing runs, so models on the meta device will do. Experts are found as ``compress`` finds
    them. An MLP is a module of two or three linear layers that fit, with "mlp", "ffn", "feed
    forward" or "expert" in its name or its class; ``replace`` tries out whether it is one. Layers
    with "attn" or "attention" in the name or class of a module around them are attention's. Heads
    (the output embedding; ``lm_head``, ``classifier``, ``score``, ``head``), routers and layers of
    one input or output are left out.

    Args:
        model: any module.
        what: ``"experts"``, ``"mlp"``, ``"attention"``, ``"linear"``, or several of them, as for
            :func:`tensormoe.selection.allocate`. By default experts if there are any, or else MLPs,
            or else linear layers.

    Raises:
        SpecError: a model without such layers, or with weights that are not floating-point numbers.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    >>> model = nn.ModuleDict({"mlp": mlp, "head": nn.Linear(8, 10)})
    >>> [(site.name, site.kind) for site in model_sites(model)]
    [('mlp', 'mlp')]
    >>> [site.name for site in model_sites(model, "linear")]
    ['mlp.0', 'mlp.2']
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be an nn.Module; got {type(model).__name__}.")
    return chosen_parts([*_all_sites(model)], checked_parts(what), type(model).__name__)


def _all_sites(model: nn.Module) -> Found:
    modules = dict(model.named_modules())
    stacks = {
        name: each
        for name, each in modules.items()
        if name
        and (
            (holds_experts(each) and (not isinstance(each, nn.ModuleList) or is_named(name, each)))
            or is_dense(name, each, model)
        )
    }
    around = {name[:place] for name in stacks for place, c in enumerate(name) if c == "."} | {""}
    left_out = _heads(model) | _routers(modules, stacks)
    mlps: dict[str, LayerSite] = {}
    for name, module in modules.items():
        if any(name.startswith(f"{each}.") for each in stacks):
            continue
        if name in stacks:
            yield "experts", _stack_site(name, module)
        elif is_linear(module) and id(module) not in left_out:
            linear = read_linear(module, repr(name), values=False)
            if min(linear.sizes) > 1:
                yield _part(name, modules, mlps), _linear_site(name, linear)
        elif name not in around and not any(name.startswith(f"{each}.") for each in mlps):
            site = _mlp_site(name, module)
            if site is not None:
                mlps[name] = site
                yield "mlp", site


def _part(name: str, modules: dict[str, nn.Module], mlps: dict[str, LayerSite]) -> str:
    """The part of the model that a linear layer belongs to."""
    if any(name.startswith(f"{each}.") for each in mlps):
        return "mlp_linear"
    parents = [name[:place] for place, c in enumerate(name) if c == "."]
    if any(_hinted(each, modules[each], _ATTENTION) for each in parents):
        return "attention"
    return "linear"


def _hinted(name: str, module: nn.Module, hints: Sequence[str]) -> bool:
    words = (name.rpartition(".")[2].lower(), type(module).__name__.lower())
    return any(hint in word for word in words for hint in hints)


def _heads(model: nn.Module) -> set[int]:
    """Modules that give a model's outputs, and those whose weights cannot be replaced."""
    found: set[int] = set()
    ask: Any = getattr(model, "get_output_embeddings", None)
    if callable(ask):
        with contextlib.suppress(AttributeError, NotImplementedError):
            found.add(id(ask()))
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _HEADS:
            found.add(id(module))
        if isinstance(module, nn.MultiheadAttention):
            # it reads the weights of its output projection, and never calls it
            found |= {id(each) for each in module.children()}
    return found


def _routers(modules: dict[str, nn.Module], stacks: dict[str, nn.Module]) -> set[int]:
    """Linear layers beside experts with an output for each."""
    found: set[int] = set()
    for name, stack in stacks.items():
        count = _stack_site(name, stack).experts
        for each in modules[name.rpartition(".")[0]].children():
            if is_linear(each) and read_linear(each, "router", False).sizes[1] == count:
                found.add(id(each))
    return found


def _itemsize(module: nn.Module) -> int:
    return next(each.dtype.itemsize for each in module.parameters())


def _linear_site(name: str, linear: Linear) -> LayerSite:
    bias = linear.bias is not None
    return LayerSite.of_linear(name, *linear.sizes, bias, linear.weight.dtype.itemsize)


def _stack_site(name: str, module: nn.Module) -> LayerSite:
    """A stack or a list of experts, or dense ones of ours."""
    made: tuple[Projection, ...]
    if isinstance(module, FactorizedExperts):
        layers: dict[str, Any] = dict(module.projections.items())
        made = tuple(
            Projection(
                role,
                each.spec.in_features,
                each.spec.out_features,
                each.spec.bias or f"{role}_bias" in module._parameters,
            )
            for role, each in layers.items()
        )
        count = module._count
    elif isinstance(module, nn.ModuleList):
        linears = {
            role: read_linear(each, f"{name}.0.{role}", False)
            for role, each in linears_by_role(module[0]).items()
        }
        made = tuple(
            Projection(role, *each.sizes, each.bias is not None) for role, each in linears.items()
        )
        count = len(module)
    else:
        count, made = stack_projections(module, name)
    return LayerSite(name, "experts", made, count, _itemsize(module))


def _mlp_site(name: str, module: nn.Module) -> LayerSite | None:
    """An MLP, as far as names and sizes tell."""
    if not name or not _hinted(name, module, _MLPS):
        return None
    layers = {key: each for key, each in module.named_modules() if is_linear(each)}
    if len(layers) not in (2, 3):
        return None
    found = [read_linear(each, f"{name}.{key}", False) for key, each in layers.items()]
    *ahead, down = found
    if len({each.sizes for each in ahead}) > 1:
        # the last one down need not be the last one by name
        down = next(
            (e for e in found if all(o.sizes != e.sizes for o in found if o is not e)), down
        )
        ahead = [each for each in found if each is not down]
    if len({each.sizes for each in ahead}) > 1 or ahead[0].sizes[1] != down.sizes[0]:
        return None
    rows, hidden = ahead[0].sizes
    return LayerSite.of_mlp(
        name,
        rows,
        hidden,
        down.sizes[1],
        gated=len(ahead) == 2,
        bias=any(each.bias is not None for each in found),
        itemsize=_itemsize(module),
    )
