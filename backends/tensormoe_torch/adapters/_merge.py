"""Adapters of a model merged into the weights that they are added to."""

from __future__ import annotations

from torch import nn

from tensormoe.errors import SpecError
from tensormoe_torch._hub import unmark
from tensormoe_torch.adapters._add import adapters_of
from tensormoe_torch.adapters._experts import AdaptedExperts
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.mixtures import ResidualExperts
from tensormoe_torch.surgery._replace import at, swap


def merge_adapters(model: nn.Module) -> nn.Module:
    """Add all adapters of a model to the weights that they belong to, in place, and drop them.

    Experts get W_n + ΔW_n each, in the model's own modules: nothing of the library is left of them.
    Linear layers can be merged if their mixtures have one expert; others mix experts input by
    input, which no matrix does.

    Either all are merged, or an error says why and nothing is. Parameters stay frozen.

    Args:
        model: after :func:`add_adapters`, or with :class:`ResidualExperts` put in by hand.

    Returns:
        The model itself.

    Raises:
        SpecError: a model without adapters, or one that cannot be merged; the message says which.

    >>> from tensormoe_torch.adapters import add_adapters
    >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> model, _ = add_adapters(model, nn.Linear, experts=1, rank=2)
    >>> merge_adapters(model)
    Sequential(
      (0): Linear(in_features=16, out_features=16, bias=True)
      (1): ReLU()
      (2): Linear(in_features=16, out_features=4, bias=True)
    )
    """
    layers = adapters_of(model)
    for name, layer in layers.items():
        with at(name):
            if not name:
                raise SpecError(
                    "the model must hold its adapters to be changed in place; it is one itself. "
                    "Call its merge()."
                )
            layer.check_merge()
            if layer.spec.bias and getattr(layer.base, "bias", None) is None:
                raise SpecError(
                    "a mixture with a bias needs a base with one, as the model has no other place "
                    "for it; got bias=False of the base. Add adapters with bias=False, or call "
                    "merge() of the layer."
                )
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    whole = [each for each in model.modules() if isinstance(each, AdaptedExperts)]
    inside = {id(each) for experts in whole for each in experts.modules()}
    alone = [each for each in layers.values() if id(each) not in inside]
    mergeable: list[AdaptedExperts | ResidualExperts] = [*whole, *alone]
    for old in mergeable:
        new = old.merge()
        for name in places[id(old)]:
            swap(model, name, old, new)
        for module in model.modules():
            if isinstance(module, FactorizedExperts):
                module.plan_ahead()
    unmark(model)
    return model
