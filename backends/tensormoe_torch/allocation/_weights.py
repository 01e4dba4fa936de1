"""Weights of the projections of a model, to be read, approximated and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe import LayerSpec
from tensormoe.decomposition import Search, decompose
from tensormoe.functional import LayerConfig
from tensormoe.selection import LayerSite
from tensormoe_torch._layer import MuMoE
from tensormoe_torch.compression._dense import DenseExperts
from tensormoe_torch.compression._read import read_experts
from tensormoe_torch.compression._samples import Samples
from tensormoe_torch.surgery._block import read_block
from tensormoe_torch.surgery._convert import fitted_layer
from tensormoe_torch.surgery._linears import Linear, read_linear


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of one projection; views of the model's own parameters.

    Args:
        name: of the projection.
        weights: matrices (in, out) side by side, of a linear layer or an MLP; or (in, out) one per
            expert, or (experts, in, out), of a stack.
        biases: likewise; None where there are none.
        stack: of which the projection is one, and its role.
    """

    name: str
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    stack: tuple[DenseExperts, str] | None = None

    @torch.no_grad()
    def approximated(
        self,
        spec: LayerSpec,
        search: Search | None,
        seed: int,
        sample: Samples | None = None,
        weighted: bool = False,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...], float | None]:
        """The same weights and biases, rebuilt from factors; of stacks with the outputs' error."""
        if self.stack is None:
            return *self._upcycled(spec), None
        experts, role = self.stack
        weight, bias = experts.decomposed(role)
        found = decompose(
            weight,
            spec.factorization,
            bias=bias,
            inputs=None if sample is None else sample.of(role, experts),
            coefficients=None if sample is None else sample.coefficients(experts.count),
            weighted=weighted,
            search=search,
            compare=False,
            seed=seed,
        )
        rebuilt, rows = MuMoE.restore(found.config(), found.parameters).materialize()
        if len(self.weights) == 1:
            return (rebuilt,), (rows if bias is not None else None,), found.report.output_error
        biases = (None,) * len(self.weights) if bias is None or rows is None else (*rows,)
        return (*rebuilt,), biases, found.report.output_error

    def _upcycled(self, spec: LayerSpec) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """The linear layers that all experts of a mixture stand for."""
        weight = torch.cat(self.weights, dim=1)
        rows = [
            weight.new_zeros(part.shape[1]) if bias is None else bias
            for part, bias in zip(self.weights, self.biases, strict=True)
        ]
        linear = Linear(weight, torch.cat(rows) if spec.bias else None)
        layer, _ = fitted_layer(LayerConfig(spec, None), linear, 0.0)
        rebuilt, bias = layer.expert(*(0,) * spec.levels)
        widths = [each.shape[1] for each in self.weights]
        weights = rebuilt.split(widths, dim=1)
        if bias is None:
            return weights, (None,) * len(widths)
        kept = zip(self.biases, bias.split(widths), strict=True)
        return weights, tuple(None if own is None else made for own, made in kept)

    @contextmanager
    def replaced(
        self, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]
    ) -> Iterator[None]:
        """The model with other weights in this place, for a while."""
        before = [each.clone() for each in self.weights]
        rows = [None if each is None else each.clone() for each in self.biases]
        try:
            self._write(weights, biases)
            yield
        finally:
            self._write(tuple(before), tuple(rows))

    @torch.no_grad()
    def _write(self, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> None:
        for place, value in zip(self.weights, weights, strict=True):
            place.copy_(value)
        for row, made in zip(self.biases, biases, strict=True):
            if row is not None and made is not None:
                row.copy_(made)


def read_weights(model: nn.Module, site: LayerSite) -> list[Weights]:
    """The weights of each projection of a layer.

    Raises:
        SpecError, ShapeError: as ``replace`` and ``compress``, where it is not what it seemed.
    """
    module, names = model.get_submodule(site.name), site.unit_names
    if site.kind == "linear":
        linear = read_linear(module, repr(site.name))
        return [Weights(names[0], (linear.weight,), (linear.bias,))]
    if site.kind == "mlp":
        block = read_block(module, repr(site.name))
        ahead = [each for each in (block.first, block.up) if each is not None]
        return [
            Weights(name, tuple(e.weight for e in parts), tuple(e.bias for e in parts))
            for name, parts in zip(names, (ahead, [block.second]), strict=True)
        ]
    experts = read_experts(module, site.name)
    found = []
    for name, each in zip(names, site.projections, strict=True):
        stack: Any = experts.stacks[each.role]
        whole = isinstance(stack.weights, Tensor)
        weights = (stack.weights,) if whole else stack.weights
        biases: Any = (None,) * len(weights)
        if stack.biases is not None and not experts.keeps_biases:
            biases = (stack.biases,) if whole else stack.biases
        found.append(Weights(name, weights, biases, (experts, each.role)))
    return found
