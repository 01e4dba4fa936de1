"""The factors of a layer, which are called for the mixture that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tensormoe.errors import ShapeError
from tensormoe.functional import EachExpert, LayerConfig, apply_each
from tensormoe.gates import OneExpert, TopK
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._autograd import mix, no_autocast
from tensormoe_torch._checks import compute_dtype
from tensormoe_torch._operator import direct
from tensormoe_torch._sharded import Loads
from tensormoe_torch._tracing import is_traced

if TYPE_CHECKING:
    from tensormoe_torch._parts import Part


class Factors(Loads, nn.ParameterDict):
    """Factors and bias by name; called with inputs and coefficients, the mixture of the experts.

    They are a module that is called, since what others hang on a module works around its call:
    PyTorch's pruning, adapters of PEFT on single parameters, gradients of single samples in
    opacus, and ``fully_shard``.

    Args:
        config: the layer.
        parameters: by name.

    Attributes:
        part: what this device has of them where they are cut over several; None elsewhere.
    """

    def __init__(self, config: LayerConfig, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self.config = config
        self.part: Part | None = None
        self._names = tuple((f"factors.{name}", name) for name in config.spec.shapes)

    # a dictionary of parameters cannot be called
    __call__ = nn.Module.__call__

    def by_name(self) -> dict[str, Tensor]:
        """The factors by canonical name, computed ones too."""
        return {name: getattr(self, short) for name, short in self._names}

    def forward(self, x: Tensor, *coefficients: Tensor | TopK | OneExpert | EachExpert) -> Tensor:
        """The mixture (..., out) of the experts' outputs.

        Args:
            x: (..., in), or ids (...) for a layer whose input is indexed.
            coefficients: (..., N_e) or a ``TopK`` a level, checked already; or one ``EachExpert``,
                for inputs (experts…, rows, in).
        """
        part = self.part
        if len(coefficients) == 1 and isinstance(coefficients[0], EachExpert):
            if part is None:
                return each(self.config, self.by_name(), x)
            made = each(part.config, *part.each_operands(self.by_name(), x))
            return part.result(made, x, each=True)
        levels = self.config.spec.levels
        given = [one for one in coefficients if not isinstance(one, EachExpert)]
        if len(given) != levels:
            raise ShapeError(
                f"factors are called with an input and {levels} coefficients, one per level; got "
                f"{len(given)}. Call the layer, or register per_sample_gradients in opacus."
            )
        if part is None:
            return mixture(self.config, self.by_name(), x, given)
        operands = part.operands(self.by_name(), x, given)
        return part.result(mixture(part.config, *operands, lead_of(self.config, x)), x)


def lead_of(config: LayerConfig, x: Tensor) -> tuple[int, ...]:
    """The leading axes of an input."""
    return tuple(x.shape if config.indexed_input else x.shape[:-1])


def mixture(
    config: LayerConfig,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    coefficients: Sequence[Tensor | TopK | OneExpert],
    lead: tuple[int, ...] | None = None,
) -> Tensor:
    """The mixture (..., out) of a layer with its factors by canonical name.

    Args:
        config: the layer.
        parameters: the factors.
        x: (..., in), or ids (...).
        coefficients: (..., N_e) or a ``TopK`` a level.
        lead: leading axes of the result, where those of the operands are merged already.
    """
    own = lead_of(config, x)
    dtype, parameters = narrowed(parameters)
    rows, given = x, [*coefficients]
    if len(own) != 1:
        count = (prod(own),)
        rows = x.reshape(*count, *x.shape[len(own) :])
        given = [with_lead(each, count) for each in given]
    if rows.dtype != dtype and rows.dtype.is_floating_point:
        rows = rows.to(dtype)
    with no_autocast(x.device.type):
        return mix(config, parameters, rows, given, own if lead is None else lead)


def each(config: LayerConfig, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Outputs (experts…, rows, out) of every expert for its own rows (experts…, rows, in)."""
    dtype, parameters = narrowed(parameters)
    # an exported model must not be bound to the numbers of rows that one plan is the cheapest for
    any_batch = torch.compiler.is_exporting()
    # what nobody differentiates may be written into
    plain = not is_traced(x) and not torch.is_grad_enabled()
    backend = direct(x) if plain else BACKEND
    with no_autocast(x.device.type):
        made: Tensor = apply_each(config, parameters, x.to(dtype), backend, any_batch=any_batch)
    return made


def narrowed(parameters: Mapping[str, Tensor]) -> tuple[torch.dtype, Mapping[str, Tensor]]:
    """The dtype that a layer runs in, and its factors in it."""
    weight = next(iter(parameters.values()))
    dtype = compute_dtype(weight)
    if dtype == weight.dtype:
        return dtype, parameters
    return dtype, {name: array.to(dtype) for name, array in parameters.items()}


def with_lead(given: Tensor | TopK | OneExpert, lead: tuple[int, ...]) -> Tensor | TopK | OneExpert:
    """Coefficients of as many inputs with other leading axes."""
    if isinstance(given, OneExpert):
        return OneExpert(given.indices.reshape(lead), given.counts)
    if isinstance(given, TopK):
        shape = (*lead, given.values.shape[-1])
        return TopK(given.indices.reshape(shape), given.values.reshape(shape))
    return given.reshape(*lead, given.shape[-1])
