"""Errors of the outputs of linear layers, by second moments of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe.errors import SpecError
from tensormoe_torch.allocation._weights import Weights
from tensormoe_torch.surgery._inputs import run_model
from tensormoe_torch.surgery._linears import is_linear

Errors = Callable[[Weights, tuple[Tensor, ...], tuple[Tensor | None, ...]], float]


def output_errors(model: nn.Module, weights: Sequence[Weights], batches: Sequence[Any]) -> Errors:
    """A function from other weights to the squared error of outputs, relative to them.

    Inputs are not kept: of each layer, a matrix (in + 1, in + 1) of second moments.

    Raises:
        SpecError: batches that do not reach a layer.
    """
    layers = {
        each.get_parameter("weight").untyped_storage().data_ptr(): each
        for each in model.modules()
        if is_linear(each)
    }
    moments: dict[str, Tensor] = {}
    handles = []
    for each in weights:
        layer = layers[each.weights[0].untyped_storage().data_ptr()]
        handles.append(layer.register_forward_pre_hook(_summed(moments, each.name)))
    try:
        for batch in batches if weights else ():
            run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for each in weights:
        if each.name not in moments:
            raise SpecError(
                f"inputs must reach every layer; {each.name!r} got none. Give other batches."
            )

    def error(each: Weights, made: tuple[Tensor, ...], rows: tuple[Tensor | None, ...]) -> float:
        moment = moments[each.name]
        old = _table(each.weights, each.biases, moment)
        off = _table(made, rows, moment) - old
        whole = float((old * (moment @ old)).sum())
        return max(0.0, float((off * (moment @ off)).sum())) / whole if whole > 0 else 0.0

    return error


def _summed(moments: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        square = x.T @ x
        moments[name] = square + moments[name] if name in moments else square

    return hook


def _table(weights: Sequence[Tensor], biases: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Weights and biases as one matrix (in + 1, out)."""
    tables = []
    for weight, bias in zip(weights, biases, strict=True):
        row = weight.new_zeros(weight.shape[1]) if bias is None else bias
        tables.append(torch.cat([weight, row[None]]).to(like.dtype))
    return torch.cat(tables, dim=1)
