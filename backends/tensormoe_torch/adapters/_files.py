"""All adapters of a model in one file."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from tensormoe.checkpoint import check_arrays
from tensormoe.errors import CheckpointError, SpecError
from tensormoe.mixtures import Adapters, ResidualConfig, adapter_of, check_adapters, read_adapters
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._dtypes import FLOATS
from tensormoe_torch._sharded import save_whole
from tensormoe_torch.adapters._add import adapters_of, install
from tensormoe_torch.adapters._experts import adapted
from tensormoe_torch.adapters._find import find_targets, has_adapters
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._find import holds_experts
from tensormoe_torch.surgery._linears import is_linear
from tensormoe_torch.surgery._replace import at

_PROJECTIONS = "projections"


def save_adapters(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write all adapters of a model to one file, without the model.

    Arrays have the names that they have in the model's ``state_dict()``. Every framework opens the
    file: ``ResidualExperts.from_adapter(base, path, name)`` takes the adapter of one module. If
    parameters are sharded, as by ``fully_shard``, every process makes this call.

    Args:
        model: with adapters.
        path: the file.

    Raises:
        SpecError: a model without adapters.
        CheckpointError: the folder is missing or the file cannot be written.

    >>> import os, tempfile
    >>> from tensormoe_torch.adapters import add_adapters
    >>> def fresh():
    ...     return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> model, _ = add_adapters(fresh(), nn.Linear, experts=4, rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "adapters.safetensors")
    ...     save_adapters(model, path)
    ...     other = load_adapters(fresh(), path)
    >>> type(other[2]).__name__
    'ResidualExperts'
    """
    layers = adapters_of(model)
    arrays = {
        name: {f"adapter.{each}": one for each, one in layer.adapter.state_dict().items()}
        for name, layer in layers.items()
    }
    held = Adapters({name: layer.config for name, layer in layers.items()}, arrays)
    save_whole(path, ResidualConfig.block, held.to_dict(), held.named())


def load_adapters(model: nn.Module, path: str | PathLike[str]) -> nn.Module:
    """Take the adapters of a file into a model, in place.

    A model that has adapters must have the same ones. One that has none gets those that the file
    describes, as :func:`add_adapters` adds them, and all else is frozen.

    Args:
        model: with or without adapters.
        path: the file, whichever framework wrote it.

    Returns:
        The model itself.

    Raises:
        CheckpointError: not a file of adapters, or those of another model; the message lists every
            difference.
        SpecError: layers that adapters cannot be added to.
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be an nn.Module; got {type(model).__name__}.")
    saved = read_adapters(path, BACKEND)
    if has_adapters(model):
        check_adapters({name: each.config for name, each in adapters_of(model).items()}, saved)
    else:
        _add(model, saved)
    for name, layer in adapters_of(model).items():
        _, arrays = adapter_of(saved, layer.config, name)
        layer._take(arrays)
    return model


def _add(model: nn.Module, saved: Adapters) -> None:
    """Add adapters as a file describes them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    planned: dict[str, dict[str, ResidualConfig]] = {}
    for path, config in saved.configs.items():
        outer, _, role = path.rpartition(".")
        experts, _, last = outer.rpartition(".")
        known = modules.get(experts)
        if last == _PROJECTIONS and (path not in modules or isinstance(known, FactorizedExperts)):
            planned.setdefault(experts, {})[role] = config
        else:
            planned[path] = {"": config}
    lines = [
        f"{name!r} is missing in the model" for name in planned if name not in modules or not name
    ]
    if not lines:
        chosen = find_targets(model, lambda name, _: name in planned)
        made: dict[int, nn.Module] = {}
        for name, module in chosen.items():
            with at(name):
                lines += _misfits(name, module, planned[name], made)
    if lines:
        raise CheckpointError(
            "the adapters of a file must be those of the model's layers. Load the model that they "
            "were made for. Differences:\n" + "\n".join(lines)
        )
    for name, configs in planned.items():
        for role, config in configs.items():
            full = f"{name}.{_PROJECTIONS}.{role}" if role else name
            _, arrays = adapter_of(saved, None, full)
            check_arrays(config.layer, arrays, BACKEND, FLOATS)
    first: Tensor = next(iter(saved.named().values()))
    install(model, chosen, planned, made, dtype=first.dtype)


def _misfits(
    name: str,
    module: nn.Module,
    planned: Mapping[str, ResidualConfig],
    made: dict[int, nn.Module],
) -> list[str]:
    """Differences between the adapters of a file and the layers of a module."""
    if is_linear(module):
        if set(planned) != {""}:
            return [f"{name!r} must be experts; got a {type(module).__name__}"]
        weight: Any = module.weight
        shape = tuple(weight.shape)
        sizes = {"": (1, *(shape[::-1] if isinstance(module, nn.Linear) else shape))}
        found = {"": (1, *_sizes(planned[""])[1:])}
    else:
        held = module
        if not isinstance(module, FactorizedExperts):
            assert holds_experts(module)
            held = made.setdefault(id(module), adapted(module, name))
        layers = held.projections.items()  # type: ignore[union-attr,operator]
        sizes = {
            role: (each.spec.num_experts, each.spec.in_features, each.spec.out_features)
            for role, each in layers
        }
        found = {role: _sizes(config) for role, config in planned.items()}
    lines = [f"{name!r} has no projection {role!r}" for role in found if role not in sizes]
    return lines + [
        f"{f'{name}.{role}' if role else name} must be experts × in × out = {size}; got "
        f"{found[role]}"
        for role, size in sizes.items()
        if role in found and found[role] != size
    ]


def _sizes(config: ResidualConfig) -> tuple[int, int, int]:
    spec = config.layer.spec
    return spec.num_experts, spec.in_features, spec.out_features
