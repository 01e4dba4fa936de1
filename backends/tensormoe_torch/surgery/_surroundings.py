"""Ties of a model to a layer: shared weights, hooks inside, code that reads weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from tensormoe.errors import SpecError
from tensormoe_torch._hooks import has_hooks
from tensormoe_torch.surgery._linears import is_linear


def check_surroundings(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Refuse modules that can't go without something else in the model changing.

    Raises:
        SpecError: weights that are tied, computed, or read by the module around; hooks inside.
    """
    owners: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(key)
    for name, module in chosen.items():
        _check_tied(name, module, chosen, owners)
        _check_inside(name, module)
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise SpecError(
                f"{name!r} can't be replaced: nn.MultiheadAttention reads its weights and never "
                "calls it. Leave it out of the selection."
            )


def _check_tied(
    name: str,
    module: nn.Module,
    chosen: Mapping[str, nn.Module],
    owners: Mapping[int, list[str]],
) -> None:
    places = [each for each, other in chosen.items() if other is module]
    for key, parameter in module.named_parameters():
        own = {f"{place}.{key}" for place in places}
        others = [other for other in owners[id(parameter)] if other not in own]
        if others:
            raise SpecError(
                f"weights of a replaced module must be its own; {name}.{key} is tied to "
                f"{others[0]}. Leave it out of the selection, or untie it first: give the module "
                "a copy of the parameter."
            )


def _check_inside(name: str, module: nn.Module) -> None:
    for key, each in module.named_modules(prefix=name):
        computed = is_linear(each) and "weight" not in each._parameters
        if computed or is_parametrized(each):
            raise SpecError(
                f"weights of a replaced module must be plain parameters; those of {key!r} are "
                "computed. Remove the parametrization or weight norm first."
            )
        if each is not module and has_hooks(each):
            raise SpecError(
                f"hooks inside a replaced block would be lost; {key!r} has some. Remove them, or "
                f"put them on {name!r} itself."
            )


def leave_fused_paths(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Make PyTorch's encoder layers call what took the place of their linear layers.

    In evaluation they would hand the weights of the layers that they once had to a fused kernel.
    """
    touched = set()
    for name in chosen:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0
            touched.add(id(parent))
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(
            id(layer) in touched for layer in encoder.layers
        ):
            # padding was to be cut away for those kernels alone
            encoder.use_nested_tensor = False
