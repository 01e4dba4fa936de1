"""A model's own experts with mixtures that are added to them, role by role."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tensormoe import LayerSpec
from tensormoe.errors import SpecError
from tensormoe.factorizations import Dense
from tensormoe.functional import LayerConfig
from tensormoe.mixtures import gated
from tensormoe_torch._activations import halves
from tensormoe_torch._layer import MuMoE
from tensormoe_torch.compression._dense import Stack
from tensormoe_torch.compression._experts import Activation, FactorizedExperts
from tensormoe_torch.compression._find import is_stacked
from tensormoe_torch.compression._gate import Own
from tensormoe_torch.compression._read import (
    is_concatenated,
    read_experts,
    stacks_of,
    whole_stacks,
)
from tensormoe_torch.mixtures import ResidualExperts


class AdaptedExperts(FactorizedExperts):
    """Experts of another model's code, each projection with a mixture that is added: W_n + ΔW_n.

    :func:`add_adapters` puts it where the model's experts were; :meth:`merge` gives those back. The
    bases of its projections are dense layers that share memory with the parameters of stacked
    experts; those of a list of experts are copied into one stack.

    Args:
        layers: :class:`ResidualExperts` or dense :class:`MuMoE` layers without gates by role.
        act: the activation, also behind ``"gate_up_proj"``, where it is of the first half.
        origin: the experts of the model, whose values are not kept.

    Attributes:
        act: as given.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        act: Activation,
        origin: nn.Module,
    ) -> None:
        both = gated(act, halves) if "gate_up_proj" in layers else act
        super().__init__(layers, both)  # type: ignore[arg-type]
        self.act = act
        # no submodule: it has no values
        self._origin = (hollow(origin),)

    @property
    def origin(self) -> nn.Module:
        """The model's own experts, on the meta device."""
        return self._origin[0]

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The model's own experts, with W_n + ΔW_n as their weights; they stay frozen.

        Raises:
            SpecError: mixtures with biases on experts without.
        """
        layers: dict[str, MuMoE] = {}
        for role, each in self.projections.items():
            layers[role] = each.merge() if isinstance(each, ResidualExperts) else each  # type: ignore[assignment]
        like = layers["down_proj"]._weight
        made = _filled(self.origin, like)
        whole = "gate_up_proj" in layers
        stacks = (whole_stacks if whole else stacks_of)(made, "the experts")
        for role, layer in layers.items():
            stack, bias = stacks[role], layer.factors["bias"] if layer.spec.bias else None
            for values, target in ((layer.factors["weight"], stack.weights), (bias, stack.biases)):
                if values is None:
                    continue
                if isinstance(target, Tensor):
                    target.copy_(values)
                    continue
                for one, place in zip(values, target or (), strict=True):
                    place.copy_(one)
        return made


def adapted(module: nn.Module, name: str) -> AdaptedExperts:
    """A model's experts as dense layers by role, which share memory with its stacks.

    Raises:
        SpecError, ShapeError: experts that compute something else, or cannot be read.
    """
    source = read_experts(module, name)
    if isinstance(source.act, Own):
        raise SpecError(
            f"adapters need experts that compute (act(x G) · (x U)) D; those of {name!r} "
            f"({type(module).__name__}) gate in a way of their own. Leave them out of the "
            "selection."
        )
    stacks = dict(source.stacks)
    if is_stacked(module) and "gate_proj" in stacks:
        if is_concatenated(module):
            # one parameter is one layer
            stacks = whole_stacks(module, name)
        else:
            stacks |= {role: _apart(stacks[role]) for role in ("gate_proj", "up_proj")}
    layers = {role: _dense(stack) for role, stack in stacks.items()}
    return AdaptedExperts(layers, source.act, module)


def hollow(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters are on the meta device, without its hooks."""
    memo: dict[int, object] = {
        id(each): nn.Parameter(torch.empty_like(each, device="meta"), requires_grad=False)
        for each in module.parameters()
    }
    made: nn.Module = copy.deepcopy(module, memo)
    return made.requires_grad_(False)


def _filled(origin: nn.Module, like: Tensor) -> nn.Module:
    """A copy of the experts with zeros of the dtype and device of ``like``."""
    made = copy.deepcopy(origin)
    for module in made.modules():
        for name, each in [*module.named_parameters(recurse=False)]:
            zeros = torch.zeros(each.shape, dtype=like.dtype, device=like.device)
            module.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
    return made


def _dense(stack: Stack) -> MuMoE:
    weight, bias = stack.tensors()
    count, rows, columns = weight.shape
    spec = LayerSpec(rows, columns, (count,), Dense(), bias is not None)
    arrays = {"factors.weight": weight} | ({} if bias is None else {"factors.bias": bias})
    return MuMoE.restore(LayerConfig(spec, None), arrays)


def _apart(stack: Stack) -> Stack:
    """A copy: entries that take turns with others are no array of their own."""
    weight, bias = stack.tensors()
    return Stack(weight.contiguous(), None if bias is None else bias.contiguous())
