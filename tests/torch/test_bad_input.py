"""What the PyTorch layers refuse to be called with: class of the error, rule, value, remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tensormoe import Gate, TopK
from tensormoe.errors import (
    BackendError,
    GateError,
    PlanError,
    ShapeError,
    TensormoeError,
)
from tensormoe_torch import MuMoE, MuMoEEmbedding, MuMoEMLP

X = torch.ones(3, 8)
IDS = torch.tensor([0, 4, 8])
ONE = torch.zeros(3, 1, dtype=torch.int64)


def layer(**options: Any) -> MuMoE:
    return MuMoE(8, 4, 3, **({"factorization": "cp", "rank": 2} | options))


def tree(**options: Any) -> MuMoE:
    return MuMoE(8, 4, (3, 2), **({"factorization": "cp", "rank": 2} | options))


def table(**options: Any) -> MuMoEEmbedding:
    return MuMoEEmbedding(9, 4, 3, **({"rank": 2} | options))


def block(**options: Any) -> MuMoEMLP:
    return MuMoEMLP(8, **({"experts": 3, "rank": 2} | options))


def shares(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


# name -> (what is called, error, what its message says in this order)
CASES: dict[str, tuple[Callable[..., Any], type[TensormoeError], str]] = {
    # inputs
    "another number of features": (
        lambda: layer()(shares(3, 7)),
        ShapeError,
        r"x must end in an axis of 8 features; got shape \(3, 7\). Check the layer's in_features",
    ),
    "no features at all": (
        lambda: layer()(torch.tensor(1.0)),
        ShapeError,
        r"x must end in an axis of 8 features; got shape \(\)",
    ),
    "an input of the block": (
        lambda: block()(shares(3, 7)),
        ShapeError,
        r"axis of 8 features; got shape \(3, 7\)",
    ),
    "an input of the gate": (
        lambda: layer().gate(shares(3, 7)),
        ShapeError,
        r"axis of 8 features; got shape \(3, 7\)",
    ),
    "coefficients of a wrong input": (
        lambda: layer().coefficients(shares(3, 7)),
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
    "integers as input": (
        lambda: layer()(X.long()),
        ShapeError,
        r"x must have the layer's dtype torch\.float32; got torch\.int64. Cast",
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
    "an array of NumPy's": (
        lambda: layer()(X.numpy()),
        BackendError,
        r"x must be an array of torch; got numpy\.ndarray. Convert it yourself",
    ),
    "an array of NumPy's for a block": (
        lambda: block()(X.numpy()),
        BackendError,
        r"x must be an array of torch; got numpy\.ndarray. Convert it yourself",
    ),
    "a list": (
        lambda: layer()([[1.0] * 8]),
        BackendError,
        r"x must be an array of torch; got builtins\.list. Convert it yourself",
    ),
    "nothing": (lambda: layer()(None), BackendError, r"got builtins\.NoneType. Convert it"),
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
    "coefficients of other experts": (
        lambda: layer()(X, shares(3, 4)),
        ShapeError,
        r"coefficients of level 0 must have shape \(3, 3\); got \(3, 4\). Their leading axes",
    ),
    "coefficients of other inputs": (
        lambda: layer()(X, shares(2, 3)),
        ShapeError,
        r"coefficients of level 0 must have shape \(3, 3\); got \(2, 3\)",
    ),
    "coefficients to broadcast": (
        lambda: layer()(X, shares(3)),
        ShapeError,
        r"coefficients of level 0 must have shape \(3, 3\); got \(3,\)",
    ),
    "coefficients of too few levels": (
        lambda: tree()(X, shares(3, 3)),
        ShapeError,
        "coefficients must have one array a level, 2; got 1",
    ),
    "coefficients of too many levels": (
        lambda: layer()(X, [shares(3, 3), shares(3, 2)]),
        ShapeError,
        "coefficients must have one array a level, 1; got 2",
    ),
    "no level at all": (
        lambda: layer()(X, ()),
        ShapeError,
        "coefficients must have one array a level, 1; got 0",
    ),
    "coefficients of no tensor": (
        lambda: tree()(X, [shares(3, 3), [[1.0, 2.0]]]),
        BackendError,
        r"coefficients of level 1 must be an array of torch.*; got builtins\.list",
    ),
    "coefficients of NumPy's": (
        lambda: layer()(X, np.ones((3, 3), "float32")),
        BackendError,
        r"coefficients of level 0 must be an array of torch.*; got numpy\.ndarray",
    ),
    "a number for coefficients": (
        lambda: layer()(X, 3),
        BackendError,
        r"coefficients of level 0 must be an array of torch.*; got builtins\.int",
    ),
    "whole coefficients": (
        lambda: layer()(X, shares(3, 3).long()),
        ShapeError,
        r"coefficients of level 0 must be real floating point; got torch\.int64. Cast them",
    ),
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
    "dense and indexed coefficients": (
        lambda: tree()(X, [TopK(ONE, shares(3, 1)), shares(3, 2)]),
        ShapeError,
        "all levels must be dense, or all indexed with one k; got a mixture",
    ),
    "levels of several k": (
        lambda: tree()(X, [TopK(ONE, shares(3, 1)), TopK(ONE.expand(3, 2), shares(3, 2))]),
        ShapeError,
        "all levels must be dense, or all indexed with one k; got a mixture",
    ),
    "an expert that is not there": (
        lambda: layer()(X, TopK(ONE + 3, shares(3, 1))),
        ShapeError,
        r"indices of coefficients must lie in \[0, 3\); got 3",
    ),
    "an expert before the first": (
        lambda: layer()(X, TopK(ONE - 1, shares(3, 1))),
        ShapeError,
        r"must lie in \[0, 3\); got -1",
    ),
    "half an expert": (
        lambda: layer()(X, TopK(ONE.float(), shares(3, 1))),
        ShapeError,
        r"must be integers; got torch\.float32. Cast them to int64",
    ),
    "indices without values": (
        lambda: layer()(X, TopK(ONE.expand(3, 2), shares(3, 1))),
        ShapeError,
        "coefficients of level 0 must have shape",
    ),
    "more kept than there are": (
        lambda: layer()(X, TopK(ONE.expand(3, 5), shares(3, 5))),
        PlanError,
        "top_k must be at most the experts of each level; got 5 for level 0 of 3. Lower k",
    ),
    "coefficients from nowhere": (
        lambda: layer(gate=None)(X),
        ShapeError,
        "this layer has no gate; got no coefficients. Call it with coefficients",
    ),
    "coefficients of no gate": (
        lambda: layer(gate=None).coefficients(X),
        ShapeError,
        "this layer has no gate; got no coefficients. Call it with coefficients",
    ),
    "coefficients of no block's gate": (
        lambda: block(gate=None)(X),
        ShapeError,
        "this block has no gate; got no coefficients. Call it with coefficients",
    ),
    # ids
    "ids that are no integers": (
        lambda: table()(IDS.float(), shares(3, 3)),
        ShapeError,
        r"ids must be integers; got torch\.float32. Cast them to int64",
    ),
    "ids to differentiate by": (
        lambda: table()(IDS.float().requires_grad_(), shares(3, 3)),
        ShapeError,
        r"ids must be integers; got torch\.float32",
    ),
    "ids that are flags": (
        lambda: table()(IDS.bool(), shares(3, 3)),
        ShapeError,
        r"ids must be integers; got torch\.bool",
    ),
    "an id beyond the vocabulary": (
        lambda: table()(torch.tensor([1, 9]), shares(2, 3)),
        ShapeError,
        r"ids must lie in \[0, 9\); got 9. Check the size they index",
    ),
    "a negative id": (
        lambda: table()(torch.tensor([-1]), shares(1, 3)),
        ShapeError,
        r"ids must lie in \[0, 9\); got -1",
    ),
    "ids elsewhere": (
        lambda: table()(IDS.to("meta"), shares(3, 3)),
        BackendError,
        "ids must be on the layer's device cpu; got meta. Move one of them",
    ),
    "ids of NumPy's": (
        lambda: table()(IDS.numpy(), shares(3, 3)),
        BackendError,
        r"ids must be an array of torch.*; got numpy\.ndarray. Convert",
    ),
    "one id as a number": (
        lambda: table()(3, shares(3)),
        BackendError,
        r"ids must be an array of torch.*; got builtins\.int. Convert",
    ),
    "no coefficients for a table": (
        lambda: table()(IDS, None),
        ShapeError,
        "got no coefficients. Call it with coefficients",
    ),
    # single experts, costs
    "an expert beyond the last": (
        lambda: layer().expert(3),
        ShapeError,
        r"expert index must lie in \[0, 3\) at level 0; got 3",
    ),
    "an expert of another depth": (
        lambda: layer().expert(0, 0),
        ShapeError,
        r"an expert has one index a level, 1; got \(0, 0\)",
    ),
    "a negative batch": (
        lambda: layer().cost(-1),
        PlanError,
        "batch must be a non-negative integer; got -1",
    ),
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
        for made in (layer(), tree(), block()):
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
