"""What the PyTorch layers refuse to be called with: class of the error, rule, value, remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tensormoe import Gate, TopK
from tensormoe.errors import BackendError, GateError, ShapeError, TensormoeError
from tensormoe_torch import MuMoE
from tests.torch._helpers import block, layer, table

X = torch.ones(3, 8)
IDS = torch.tensor([0, 4, 8])
ONE = torch.zeros(3, 1, dtype=torch.int64)


def shares(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


# name -> (what is called, error, what its message says in this order)
CASES: dict[str, tuple[Callable[..., Any], type[TensormoeError], str]] = {
    # inputs
    "an input of the gate": (
        lambda: layer().gate(shares(3, 7)),
        ShapeError,
        r"axis of 8 features; got shape \(3, 7\)",
    ),
    "an input elsewhere": (
        lambda: layer()(X.to("meta")),
        BackendError,
        r"x must be on the layer's device cpu; got meta. Move one of them with \.to",
    ),
    "a layer elsewhere": (
        lambda: layer(device="meta")(X),
        BackendError,
        "x must be on the layer's device meta; got cpu. Move",
    ),
    "a wider input": (
        lambda: layer()(X.double()),
        ShapeError,
        r"x must have the layer's dtype torch\.float32; got torch\.float64. Cast the input",
    ),
    "a narrower input": (
        lambda: layer()(X.bfloat16()),
        ShapeError,
        r"x must have the layer's dtype torch\.float32; got torch\.bfloat16. Cast",
    ),
    "a narrow layer": (
        lambda: layer(dtype=torch.float16)(X),
        ShapeError,
        r"x must have the layer's dtype torch\.float16; got torch\.float32. Cast",
    ),
    "integers under autocast": (
        lambda: under_autocast(layer(), X.long()),
        ShapeError,
        r"x must have the layer's dtype torch\.float32; got torch\.int64. Cast",
    ),
    "doubles under autocast": (
        lambda: under_autocast(layer(), X.double()),
        ShapeError,
        r"x must have the layer's dtype torch\.float32; got torch\.float64. Cast",
    ),
    "complex input": (
        lambda: layer()(X.to(torch.complex64)),
        ShapeError,
        r"x must have the layer's dtype torch\.float32; got torch\.complex64. Cast",
    ),
    "a sparse input": (
        lambda: layer()(X.to_sparse()),
        BackendError,
        r"x must be a plain, dense array; got torch.Tensor that is not. Convert it: .* sparse",
    ),
    "a nested input": (
        lambda: layer()(torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged)),
        BackendError,
        r"x must be a plain, dense array; got torch.NestedTensor that is not. Convert it",
    ),
    "batch norm of one token": (
        lambda: layer(gate=Gate(normalization="batch"))(X[:1]),
        GateError,
        "must train on at least 2 tokens; got 1. Use larger batches",
    ),
    # coefficients
    "coefficients elsewhere": (
        lambda: layer()(X, shares(3, 3, device="meta")),
        BackendError,
        "coefficients must be on the layer's device cpu; got meta. Move one of them",
    ),
    "indices elsewhere": (
        lambda: layer()(X, TopK(ONE.to("meta"), shares(3, 1))),
        BackendError,
        "coefficients must be on the layer's device cpu; got meta. Move one of them",
    ),
    "sparse coefficients": (
        lambda: layer()(X, shares(3, 3).to_sparse()),
        BackendError,
        r"coefficients of level 0 must be a plain, dense array; got torch.Tensor that is not",
    ),
    # ids
    "ids to differentiate by": (
        lambda: table()(IDS.float().requires_grad_(), shares(3, 3)),
        ShapeError,
        r"ids must be integers; got torch\.float32",
    ),
    "ids elsewhere": (
        lambda: table()(IDS.to("meta"), shares(3, 3)),
        BackendError,
        "ids must be on the layer's device cpu; got meta. Move one of them",
    ),
    "no coefficients for a table": (
        lambda: table()(IDS, None),
        ShapeError,
        "got no coefficients. Call it with coefficients",
    ),
    # single experts, costs
}


def under_autocast(made: MuMoE, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return made(x)


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str) -> None:
    call, error, message = CASES[name]
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error
    # the message stands alone: it is a sentence, and not a traceback of a framework
    assert str(caught.value).rstrip().endswith((".", "'", ")"))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
def test_empty_batches_are_handled(lead: tuple[int, ...], grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        for made in (layer(), layer((3, 2)), block()):
            output = made(shares(*lead, 8))
            assert output.shape == (*lead, made(X).shape[-1])
        ids = torch.zeros(lead, dtype=torch.int64)
        output = table()(ids, shares(*lead, 3))
        assert output.shape == (*lead, 4)
        chosen = TopK(torch.zeros((*lead, 2), dtype=torch.int64), shares(*lead, 2))
        assert layer()(shares(*lead, 8), chosen).shape == (*lead, 4)
    if grad:
        output.sum().backward()


def test_what_is_refused_leaves_no_trace() -> None:
    """Batch norm's statistics are those of before, whatever fails behind the gate."""
    made = layer(gate=Gate(normalization="batch"))
    before = {name: each.clone() for name, each in made.state_dict().items()}
    for wrong in (X[:1], X.double(), shares(3, 7)):
        with pytest.raises(TensormoeError):
            made(wrong)
    assert all(torch.equal(each, before[name]) for name, each in made.state_dict().items())
