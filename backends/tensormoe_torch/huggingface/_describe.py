"""Layers as plain values, and the layers that plain values describe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from tensormoe.errors import SpecError
from tensormoe.functional import BlockConfig
from tensormoe_torch._activations import ACTIVATIONS
from tensormoe_torch._embedding import MuMoEEmbedding
from tensormoe_torch._layer import MuMoE
from tensormoe_torch._mlp import MuMoEMLP
from tensormoe_torch._pre_normed import PreNormed
from tensormoe_torch.adapters import AdaptedExperts
from tensormoe_torch.compression._experts import PROJECTIONS, Activation, FactorizedExperts
from tensormoe_torch.huggingface._activations import act_of, name_of
from tensormoe_torch.mixtures import ResidualExperts
from tensormoe_torch.surgery._replace import at

KINDS = (MuMoE, MuMoEEmbedding, MuMoEMLP, FactorizedExperts, AdaptedExperts, ResidualExperts)
EXPERTS = (FactorizedExperts.__name__, AdaptedExperts.__name__)
"""Kinds whose layers are in ``projections``."""
ADAPTERS = "adapters"
"""Mixtures that are added to projections, by role."""
BITS = "bits"
"""8 or 4 of projections whose factors are rounded, by role."""
_KEYS = {each.__name__: {"kind", "config"} for each in KINDS} | {
    MuMoEMLP.__name__: {"kind", "act", "config"},
    FactorizedExperts.__name__: {"kind", "act", "biases", "projections"},
    AdaptedExperts.__name__: {"kind", "act", "biases", "projections"},
}
_ROLES = tuple(
    {"down_proj", *first} for first in (("gate_up_proj",), ("gate_proj", "up_proj"), ("up_proj",))
)


def described(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every layer of a model that is tensormoe's, by name.

    Raises:
        SpecError: one that plain values can't rebuild.
    """
    found = {}
    for name, module in _outermost(model):
        with at(name):
            found[name] = _values(module)
    return found


def entry(name: str, values: Any) -> str:
    """The kind of a described layer, whose keys and roles are checked, and nothing else.

    Raises:
        SpecError: an unknown kind, or other keys than that kind's.
    """
    kind = values.get("kind") if isinstance(values, Mapping) else values
    if not isinstance(kind, str) or kind not in _KEYS:
        raise SpecError(
            f"the kind of {name!r} must be one of {', '.join(_KEYS)}; got {kind!r:.80}. A newer "
            "tensormoe may have written it: pip install --upgrade tensormoe."
        )
    optional = {ADAPTERS} if kind in EXPERTS else set()
    if kind == FactorizedExperts.__name__ and values.get("merged") is True:
        optional = optional | {"merged"}
    if kind == FactorizedExperts.__name__:
        optional = optional | {BITS}
    if set(values) - optional != _KEYS[kind]:
        raise SpecError(
            f"a {kind} must have exactly {sorted(_KEYS[kind])}; {name!r} has "
            f"{sorted(values)!r:.200}."
        )
    if kind in EXPERTS:
        layers, biases = values["projections"], values["biases"]
        roles = set(layers) if isinstance(layers, Mapping) else layers
        if not isinstance(roles, set) or roles not in _ROLES:
            raise SpecError(
                "the projections of experts must be gate_proj, up_proj and down_proj, up_proj and "
                f"down_proj, or gate_up_proj and down_proj; {name!r} has {layers!r:.80}."
            )
        if not isinstance(biases, list) or not all(each in PROJECTIONS for each in biases):
            raise SpecError(f"biases must be a list of projections; {name!r} has {biases!r:.80}.")
        if not {*biases} <= roles or len({*biases}) < len(biases):
            raise SpecError(f"biases must be of the projections; {name!r} has {biases!r:.80}.")
        adapters = values.get(ADAPTERS, {})
        if not isinstance(adapters, Mapping) or not {*adapters} <= roles:
            raise SpecError(f"adapters must be of the projections; {name!r} has {adapters!r:.80}.")
        bits = values.get(BITS, {})
        known = isinstance(bits, Mapping) and {*bits} <= roles
        if not known or not all(type(each) is int and each in (4, 8) for each in bits.values()):
            raise SpecError(f"bits must be 4 or 8, of the projections; {name!r} has {bits!r:.80}.")
    return kind


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: str | None = None
    for name, module in model.named_modules(remove_duplicate=False):
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, (*KINDS, PreNormed)):
            inside = f"{name}."
            yield name, module


def _values(module: nn.Module) -> dict[str, Any]:
    values: dict[str, Any] = {"kind": _kind(module)}
    if isinstance(module, ResidualExperts):
        _check_own(module.base)
    if type(module) is not FactorizedExperts:
        _check_floats(module)
    if isinstance(module, MuMoEMLP):
        return values | _block_values(module)
    if not isinstance(module, FactorizedExperts):
        config: Any = module.config
        return values | {"config": config.to_dict()}
    layers: dict[str, Any] = dict(module.projections.items())
    adapters = {r: each for r, each in layers.items() if isinstance(each, ResidualExperts)}
    layers |= {role: each.base for role, each in adapters.items()}
    if adapters:
        values[ADAPTERS] = {role: each.config.to_dict() for role, each in adapters.items()}
    return values | {
        "act": name_of(module.act if isinstance(module, AdaptedExperts) else module.act_fn),
        "biases": [role for role in layers if f"{role}_bias" in module._parameters],
        "projections": {role: each.config.to_dict() for role, each in layers.items()},
        # which became one is in the buffer `groups`, with the weights
        **({} if getattr(module, "groups", None) is None else {"merged": True}),
        **({BITS: bits} if (bits := _bits(layers)) else {}),
    }


def _bits(layers: Mapping[str, Any]) -> dict[str, int]:
    """Bits of rounded layers, by role."""
    found = {role: getattr(each, "bits", None) for role, each in layers.items()}
    return {role: bits for role, bits in found.items() if bits is not None}


def _check_floats(module: nn.Module) -> None:
    """Refuse rounded factors of other layers than experts.

    Raises:
        SpecError: the module holds some.
    """
    for each in module.modules():
        bits = getattr(each, "bits", None) if isinstance(each, MuMoE | MuMoEEmbedding) else None
        if bits is not None:
            raise SpecError(
                f"factors of {type(module).__name__} must be floating-point to be saved with a "
                f"model of transformers; got some of {bits} bits. Call dequantize() first, or save "
                "the layer by itself."
            )


def _check_own(base: nn.Module) -> None:
    """Refuse a base that is not the model's own any more.

    Raises:
        SpecError: it holds layers of the library.
    """
    held = next((each for each in base.modules() if isinstance(each, KINDS)), None)
    if held is not None:
        raise SpecError(
            f"the base of an adapter must be the model's own to be saved with a model of "
            f"transformers; got one with a {type(held).__name__}. Save the adapters with "
            "save_adapters, or the state_dict()."
        )


def _block_values(block: MuMoEMLP) -> dict[str, Any]:
    """A block, whose activation may be one that is named only in transformers."""
    if block.act is None:
        return {"act": None, "config": block.config.to_dict()}
    config = replace(block.config, act_layer=next(iter(ACTIVATIONS))).to_dict()
    return {"act": name_of(block.act), "config": config | {"act_layer": None}}


def block_config(values: Mapping[str, Any]) -> tuple[BlockConfig, Activation | None]:
    """The inverse of :func:`_block_values`.

    Raises:
        SpecError: values that are of no block.
    """
    if values["act"] is None:
        return BlockConfig.from_dict(values["config"]), None
    act, config = act_of(values["act"]), values["config"]
    if not isinstance(config, Mapping) or config.get("act_layer", "") is not None:
        raise SpecError(f"a block has one activation; got act={values['act']!r:.80} and {config}.")
    named = BlockConfig.from_dict({**config, "act_layer": next(iter(ACTIVATIONS))})
    return replace(named, act_layer=None), act


def _kind(module: nn.Module) -> str:
    """The name of a module's class in the library.

    Raises:
        SpecError: it is of a class of somebody else's, which a file can't name.
    """
    # under fully_shard a module is of a class that PyTorch makes of its own
    kinds = [type(module), *type(module).__bases__] if _sharded(module) else [type(module)]
    for kind in kinds:
        if kind in KINDS:
            return kind.__name__
    raise SpecError(
        f"a layer must be one of {', '.join(each.__name__ for each in KINDS)} to be saved with a "
        f"model of transformers; got {type(module).__name__}, whose code no file can hold. Save "
        "the model's state_dict() instead."
    )


def _sharded(module: nn.Module) -> bool:
    return any(each.__name__ == "FSDPModule" for each in type(module).__mro__)
