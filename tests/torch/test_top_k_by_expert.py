"""Coefficients by index of dense experts: tokens are sent to experts, and no matrix is copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tensormoe import CP, TopK
from tensormoe_torch import MuMoE

ROWS, SIZES, EXPERTS, K = (3, 40), (64, 48), 8, 2


def layer_of(kind: Any = "dense", bias: bool = True) -> MuMoE:
    torch.manual_seed(0)
    return MuMoE(*SIZES, EXPERTS, kind, bias=bias, gate=None, dtype=torch.float64)


def chosen() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, indices and values."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*ROWS, SIZES[0], dtype=torch.float64, generator=generator)
    drawn = torch.rand(*ROWS, EXPERTS, dtype=torch.float64, generator=generator)
    values, indices = drawn.topk(K, -1)
    return x.requires_grad_(), indices, values.requires_grad_()


class Largest(TorchDispatchMode):
    """The most entries that an operation made."""

    entries = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.entries = max(self.entries, made.numel())
        return made


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_dense_coefficients(bias: bool) -> None:
    layer = layer_of(bias=bias)
    x, indices, values = chosen()
    assert layer.config.sorts(indices.numel())
    sources = [x, values, *layer.parameters()]
    cotangent = torch.randn(*ROWS, SIZES[1], dtype=torch.float64)
    found = layer(x, TopK(indices, values))
    whole = torch.zeros(*ROWS, EXPERTS, dtype=torch.float64).scatter(-1, indices, values)
    wanted = layer(x, whole)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found.shape == wanted.shape
    pairs = [torch.autograd.grad(each, sources, cotangent) for each in (found, wanted)]
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_no_matrix_is_copied_for_every_row() -> None:
    layer = layer_of()
    x, indices, values = chosen()
    with torch.no_grad(), Largest() as largest:
        layer(x, TopK(indices, values))
    # the experts themselves are of this size; a copy per row would be 30 times as large
    assert largest.entries <= EXPERTS * SIZES[0] * SIZES[1]


def test_second_derivatives() -> None:
    layer = layer_of()
    x, indices, values = chosen()

    def run(x: Tensor, values: Tensor) -> Tensor:
        made: Tensor = layer(x, TopK(indices[:1, :3], values))
        return made

    short = x[:1, :3].detach().requires_grad_(), values[:1, :3].detach().requires_grad_()
    assert torch.autograd.gradcheck(run, short, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, short, fast_mode=True)


def test_compiled_exported_and_empty_calls() -> None:
    layer = layer_of().float()
    x, indices, values = (each.detach() for each in chosen())
    x, values = x.float(), values.float()
    wanted = layer(x, TopK(indices, values))

    def call(x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        made: Tensor = layer(x, TopK(indices, values))
        return made

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, indices, values), wanted, rtol=1e-5, atol=1e-5)
    assert call(x[:0], indices[:0], values[:0]).shape == (0, ROWS[1], SIZES[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(x, indices, values).dtype == layer(x, torch.ones(*ROWS, EXPERTS)).dtype


def test_small_factors_are_still_gathered() -> None:
    assert not layer_of(CP(4)).config.sorts(ROWS[0] * ROWS[1] * K)
