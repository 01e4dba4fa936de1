"""Build factorized layers of a fresh model from a file's description; nothing is allocated."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from tensormoe import LayerSpec
from tensormoe.checkpoint._files import open_regular
from tensormoe.checkpoint._safetensors import parse_entries, read_frame
from tensormoe.errors import CheckpointError, SpecError
from tensormoe.factorizations import Dense
from tensormoe.functional import LayerConfig
from tensormoe.mixtures import ResidualConfig
from tensormoe_torch._embedding import MuMoEEmbedding
from tensormoe_torch._layer import MuMoE
from tensormoe_torch._mlp import MuMoEMLP
from tensormoe_torch.adapters import AdaptedExperts
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._find import is_stacked, takes_blocks, takes_routing
from tensormoe_torch.huggingface._activations import activation_of
from tensormoe_torch.huggingface._describe import ADAPTERS, BITS, EXPERTS, block_config, entry
from tensormoe_torch.mixtures import ResidualExperts
from tensormoe_torch.surgery._linears import is_linear, read_linear
from tensormoe_torch.surgery._replace import at

_DAMAGED = "One of them is damaged or incomplete: copy the folder anew."


def install(
    model: PreTrainedModel,
    modules: Mapping[str, Mapping[str, Any]],
    files: Sequence[str] | None,
) -> list[nn.Module]:
    """Replace modules by the layers that are described, on the meta device.

    Args:
        model: as its class makes it.
        modules: descriptions by name.
        files: that the weights are in; None where they are given otherwise.

    Returns:
        The layers.

    Raises:
        SpecError: a module that the model does not have, or a layer that does not fit it.
        CheckpointError: layers that are larger than the files, or other ones than they hold.
    """
    if files is not None:
        _check_files(modules, files)
    made: dict[int, nn.Module] = {}
    for name, values in modules.items():
        place = _place(name, model)
        if place is None:
            continue
        old = model.get_submodule(place)
        with at(name):
            new = made.get(id(old)) or _build(values, old, name)
        made[id(old)] = new
        parent, _, leaf = place.rpartition(".")
        model.get_submodule(parent).register_module(leaf, new)
    return list(made.values())


def _check_files(modules: Mapping[str, Mapping[str, Any]], files: Sequence[str]) -> None:
    """Refuse, before anything is planned or allocated, layers that the files do not hold."""
    specs = []
    needed = wanted = 0
    for name, values in modules.items():
        with at(name):
            specs += [_spec(each) for each in _layers(values)]
            for role, bits in values.get(BITS, {}).items():
                spec = _spec(values["projections"][role])
                # less than the two bytes that all others have
                needed -= spec.num_parameters * (16 - bits) // 8
                # scales beside the codes
                wanted += len(spec.shapes)
    # every entry has two bytes or more
    entries = sum(each.num_parameters for each in specs)
    needed += 2 * entries
    size = sum(os.path.getsize(each) for each in files)
    if needed > size:
        raise CheckpointError(
            f"the layers that config.json describes have {entries:,} entries, of {needed:,} bytes "
            f"or more; the files of the model hold {size:,}. {_DAMAGED}"
        )
    wanted += sum(len(each.shapes) for each in specs)
    found = sum(".factors." in key for each in files for key in _keys(each))
    if found != wanted:
        raise CheckpointError(
            f"the layers that config.json describes have {wanted} factors; the files of the model "
            f"hold {found}. {_DAMAGED}"
        )


def _keys(path: str) -> Iterable[str]:
    """Names of a file's tensors."""
    with open_regular(path) as (file, size):
        return parse_entries(read_frame(path, file, size, 100 * 10**6))[0]


def _layers(values: Mapping[str, Any]) -> list[Any]:
    """The configurations of single layers in a description."""
    if "projections" in values:
        adapters = [ResidualConfig.from_dict(each) for each in values.get(ADAPTERS, {}).values()]
        return [*values["projections"].values(), *(each.layer.to_dict() for each in adapters)]
    config = values["config"]
    if values["kind"] == ResidualExperts.__name__:
        return [ResidualConfig.from_dict(config).layer.to_dict()]
    if isinstance(config, Mapping) and "first" in config:
        return [config["first"], config.get("second")]
    return [config]


def _spec(config: object) -> LayerSpec:
    spec = config.get("spec") if isinstance(config, Mapping) else None
    return LayerSpec.from_dict(spec)  # type: ignore[arg-type]


def _place(name: str, model: PreTrainedModel) -> str | None:
    """Name of a described layer's module in a model; None if the model lacks that part.

    Files may have the names that transformers gave modules in earlier versions, a prefix that
    the model lacks, or lack one that the model has.

    Raises:
        SpecError: nowhere.
    """
    there = {key for key, _ in model.named_modules(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    names = [name]
    renamed = f"{name}.projections"
    for each in get_model_conversion_mapping(model):
        if isinstance(each, WeightRenaming):
            renamed, _ = each.rename_source_key(renamed)
    names.append(renamed.removesuffix(".projections"))
    for each in names:
        for found in (each, prefix + each, each.removeprefix(prefix)):
            if found in there:
                return found
    ends = [key for key in there for each in names if key.endswith(f".{each}")]
    if len({*ends}) == 1:
        return ends[0]
    if model.base_model is model and not name.startswith(prefix):
        # a head, where only the body is loaded; transformers lists its weights as unexpected
        return None
    raise SpecError(
        f"the model must have the layer {name!r} that config.json describes; "
        f"{type(model).__name__} has none. Load it with the class that it was saved with: "
        "'architectures' in config.json."
    )


def _build(values: Mapping[str, Any], old: nn.Module, name: str) -> nn.Module:
    kind = entry(name, values)
    first = next(old.parameters(), None)
    dtype = torch.get_default_dtype() if first is None else first.dtype
    options: dict[str, Any] = {"device": "meta", "dtype": dtype}
    if kind in EXPERTS:
        return _experts(values, old, options)
    if kind == ResidualExperts.__name__:
        residual = ResidualConfig.from_dict(values["config"])
        if is_linear(old):
            _check_linear(residual.layer.spec, old)
        return ResidualExperts.of(residual, old, **options)
    if kind == MuMoEMLP.__name__:
        block, act = block_config(values)
        return MuMoEMLP.of(block, act=act, **options)
    spec = _spec(values["config"])
    sizes = spec.in_features, spec.out_features
    if is_linear(old):
        _check_linear(spec, old)
    if isinstance(old, nn.Embedding) and (old.num_embeddings, old.embedding_dim) != sizes:
        raise SpecError(f"the table must have the sizes of the {old}; got {sizes}.")
    config = LayerConfig.from_dict(values["config"])
    if config.indexed_input != (kind == MuMoEEmbedding.__name__):
        raise SpecError(f"a {kind} can't have indexed_input={config.indexed_input}.")
    return (MuMoEEmbedding if config.indexed_input else MuMoE).of(config, **options)


def _check_linear(spec: LayerSpec, old: nn.Module) -> None:
    """Refuse a layer of other sizes than the model's.

    Raises:
        SpecError: they are others.
    """
    sizes = spec.in_features, spec.out_features
    if read_linear(old, "the layer", values=False).sizes != sizes:
        raise SpecError(f"the layer must have the sizes of the {old}; got {sizes}.")


def _experts(
    values: Mapping[str, Any], old: nn.Module, options: Mapping[str, Any]
) -> FactorizedExperts:
    specs = {role: _spec(each) for role, each in values["projections"].items()}
    fused = "gate_up_proj" in specs
    up, down = specs["gate_up_proj" if fused else "up_proj"], specs["down_proj"]
    count, sizes = _dense_sizes(old)
    groups = None
    if values.get("merged"):
        groups = torch.empty(count, dtype=torch.long, device=options["device"])
        merged, count = count, down.num_experts
        if count > merged:
            raise SpecError(
                f"merged experts must be at most the {merged} of the model; got {count}."
            )
    hidden = down.in_features * (2 if fused else 1)
    fitting = (
        all(each.experts == (count,) for each in specs.values())
        and up.out_features == hidden
        and specs.get("gate_proj", up).out_features == hidden
        and {each.in_features for role, each in specs.items() if role != "down_proj"}
        == {up.in_features}
        and sizes in (None, {down.in_features, down.out_features})
    )
    if not fitting:
        raise SpecError(
            f"the layers of experts must fit one another and the {count} experts of the model; got "
            f"{', '.join(f'{role} {each}' for role, each in specs.items())}."
        )
    configs = {role: LayerConfig.from_dict(each) for role, each in values["projections"].items()}
    if any(each.gate is not None or each.indexed_input for each in configs.values()):
        raise SpecError("layers of experts must have no gate and no indexed input: a router does.")
    biases = {
        role: torch.empty(count, specs[role].out_features, **options) for role in values["biases"]
    }
    layers: dict[str, Any] = {role: MuMoE.of(each, **options) for role, each in configs.items()}
    for role, bits in values.get(BITS, {}).items():
        layers[role].quantize(bits)
    for role, each in values.get(ADAPTERS, {}).items():
        residual = ResidualConfig.from_dict(each)
        layers[role] = ResidualExperts.of(residual, layers[role], **options)
    if values["kind"] == AdaptedExperts.__name__:
        if biases or not all(isinstance(each.factorization, Dense) for each in specs.values()):
            raise SpecError(
                "experts with adapters must be dense layers with biases of their own; got "
                f"{', '.join(map(str, specs.values()))}."
            )
        return AdaptedExperts(layers, activation_of(values["act"], old, False), old)
    act = activation_of(values["act"], old, fused)
    return FactorizedExperts(layers, act, biases, groups)


def _dense_sizes(old: nn.Module) -> tuple[int, set[int] | None]:
    """Number of experts of the model's own module, and sizes of a down projection if it tells.

    Raises:
        SpecError: it is not a module of experts, or one that is called in another way.
    """
    if isinstance(old, nn.ModuleList):
        return len(old), None
    if not is_stacked(old) or not (takes_routing(old) or takes_blocks(old)):
        raise SpecError(
            "experts must take the place of experts that are called with tokens, indices and "
            f"weights, or with an equal block of tokens each; {type(old).__name__} are not. "
            "Compress such a model with --dense."
        )
    count, *sizes = old.get_parameter("down_proj").shape
    return count, {*sizes}
