"""Factors in 8 or 4 bits, which become floating-point numbers when they are used."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe._rounding import CODES, GROUP, SCALES, code_shapes, round_to_nearest, rounded_values
from tensormoe.errors import SpecError
from tensormoe.factorizations import expert_leg
from tensormoe.functional import EachExpert, LayerConfig
from tensormoe.gates import OneExpert, TopK
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._factors import Factors
from tensormoe_torch._factors import each as each_row
from tensormoe_torch._tracing import is_traced


class RoundedFactor(nn.Module):
    """One factor in codes and scales, which are buffers: it does not train.

    Args:
        shape: of the factor.
        bits: 8 or 4.
        device: of the buffers.
        dtype: of the scales, and of the values.

    Attributes:
        codes: int8 in the factor's shape, or uint8 (groups, 32) with two codes of 4 bits in
            each byte.
        scales: one for each 64 entries in row-major order.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self, shape: tuple[int, ...], bits: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.shape, self.bits = tuple(shape), bits
        shapes = code_shapes(self.shape, bits)
        kind = torch.int8 if bits == 8 else torch.uint8
        self.register_buffer(CODES, torch.zeros(shapes[CODES], device=device, dtype=kind))
        self.register_buffer(SCALES, torch.zeros(shapes[SCALES], device=device, dtype=dtype))

    def forward(self) -> Tensor:
        """The factor, in the dtype of the scales."""
        made: Tensor = rounded_values(self.codes, self.scales, self.shape, self.bits, BACKEND)
        return made

    def some(self, index: Tensor, axis: int) -> Tensor:
        """Some slices along an axis; only these are made of their codes, if groups end with them.

        Args:
            index: their numbers.
            axis: of the factor.
        """
        outer, inner = prod(self.shape[:axis]), prod(self.shape[axis + 1 :])
        if inner % GROUP:
            return self().index_select(axis, index)
        count = self.shape[axis]
        codes = self.codes.reshape(outer, count, inner * self.bits // 8).index_select(1, index)
        scales = self.scales.reshape(outer, count, inner // GROUP).index_select(1, index)
        shape = (*self.shape[:axis], len(index), *self.shape[axis + 1 :])
        rows = codes.reshape(shape if self.bits == 8 else (-1, GROUP // 2))
        made: Tensor = rounded_values(rows, scales.flatten(), shape, self.bits, BACKEND)
        return made

    @torch.no_grad()
    def put(self, values: Tensor) -> None:
        """Take the nearest codes of values."""
        codes, scales = round_to_nearest(values, self.bits, BACKEND)
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    def extra_repr(self) -> str:
        """The part of ``repr`` in parentheses."""
        return f"{self.shape}, bits={self.bits}"


class RoundedFactors(Factors):
    """Factors and bias by name, in 8 or 4 bits: a mapping of values that can be read alone.

    Args:
        config: the layer.
        bits: 8 or 4.
        device: of codes and scales.
        dtype: of scales and values.
    """

    def __init__(
        self, config: LayerConfig, bits: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(config, {})
        self.bits = bits
        # in the order of a dictionary of parameters, which knows the names
        for name, shape in sorted(config.spec.shapes.items()):
            self._keys[name] = None
            self.add_module(name, RoundedFactor(shape, bits, device, dtype))
        # axis of the experts, where each has slices of its own of all factors
        legs = {each.name: each.legs for each in config.spec.network.all_factors}
        single = config.spec.levels == 1 and all(expert_leg(0) in each for each in legs.values())
        self._axes = {n: each.index(expert_leg(0)) for n, each in legs.items()} if single else {}

    def factor(self, name: str) -> RoundedFactor:
        """Codes and scales of a factor."""
        found = self.get_submodule(name)
        assert isinstance(found, RoundedFactor)
        return found

    def __getitem__(self, name: str) -> Any:
        return self.factor(name)()

    def __setitem__(self, name: str, value: Any) -> None:
        raise SpecError(unchanged(name, self.bits))

    def forward(self, x: Tensor, *coefficients: Tensor | TopK | OneExpert | EachExpert) -> Tensor:
        """The mixture (..., out); of few rows with an expert each, from the slices of these."""
        first = coefficients[0] if len(coefficients) == 1 else None
        if isinstance(first, OneExpert) and self._takes_slices(x, first):
            some = {
                f"factors.{name}": self.factor(name).some(first.indices, axis)
                for name, axis in self._axes.items()
            }
            return each_row(_of_experts(self.config, len(x)), some, x[:, None])[:, 0]
        return super().forward(x, *coefficients)

    def _takes_slices(self, x: Tensor, given: OneExpert) -> bool:
        """Whether rows are so few that slices for each are less than all experts."""
        if not self._axes or self.config.indexed_input or is_traced(x) or x.ndim != 2:
            return False
        count = self.config.spec.num_experts
        # rows of no expert have no slices
        own = given.counts is None or len(given.counts) == count
        return own and 0 < 2 * len(x) <= count

    def by_name(self) -> dict[str, Tensor]:
        """The factors by canonical name, made of their codes."""
        return {name: self[short] for name, short in self._names}


@lru_cache(maxsize=256)
def _of_experts(config: LayerConfig, count: int) -> LayerConfig:
    """The configuration of some of the experts of a layer."""
    return replace(config, spec=replace(config.spec, experts=(count,)))


def unchanged(name: str, bits: int) -> str:
    """The message for what needs floating-point factors."""
    return (
        f"factors of {bits} bits can't be changed; got {name!r}. Call dequantize() of the layer or "
        "of its experts first, and quantize(…) afterwards."
    )
