"""Mixtures of decoders: the formula and their initial values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe import Gate
from tensormoe.errors import GateError, ShapeError, SpecError
from tensormoe_torch import from_linear, from_mlp, replace, restored, silence_experts
from tensormoe_torch.mxd import MixtureOfDecoders
from tests.torch._helpers import randomized


def mlp(seed: int = 7, width: int = 8, hidden: int = 32) -> nn.Sequential:
    torch.manual_seed(seed)
    first = nn.Linear(width, hidden)
    # far from linear, as trained ones are
    first.weight.data *= 3.0
    return nn.Sequential(first, nn.SiLU(), nn.Linear(hidden, width))


def rows(count: int, width: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def by_hand(block: MixtureOfDecoders, x: Tensor, k: int) -> Tensor:
    """The paper's formula, with PyTorch's own selection."""
    logits = (x @ block.gate.projection_0 + block.gate.bias_0).relu()
    values, places = logits.topk(k)
    a = torch.zeros_like(logits).scatter(-1, places, values)
    z = F.gelu(F.linear(x, block.encoder.weight, block.encoder.bias))
    factors = block.decoder.factors
    assert block.bias is not None
    return (a @ factors.expert_0) * (z @ factors.input) + block.bias


def test_the_block_is_the_formula_and_so_are_its_gradients() -> None:
    block = randomized(MixtureOfDecoders(6, 20, 5, experts=30, k=4, dtype=torch.float64))
    x = rows(24, 6).double().reshape(2, 12, 6)
    want = by_hand(block, x, 4)
    torch.testing.assert_close(block(x), want)
    parameters = tuple(block.parameters())
    given = torch.randn_like(want)
    found = torch.autograd.grad((block(x) * given).sum(), parameters)
    expected = torch.autograd.grad((want * given).sum(), parameters)
    torch.testing.assert_close(found, expected)


def test_it_is_a_sum_of_full_experts() -> None:
    block = randomized(MixtureOfDecoders(6, 20, 5, experts=7, k=3, dtype=torch.float64))
    x = rows(9, 6).double()
    (a,) = block.coefficients(x)
    z = block.hidden(x)
    total = torch.zeros(9, 5, dtype=torch.float64) + block.bias
    for n in range(7):
        weight, bias = block.decoder.expert(n)
        assert bias is None
        assert torch.linalg.matrix_rank(weight) == 5
        total = total + a[:, n : n + 1] * (z @ weight)
    torch.testing.assert_close(block(x), total)
    # the gate need not be asked
    torch.testing.assert_close(
        block(x, coefficients=2.0 * a) - block.bias, 2 * (total - block.bias)
    )


def test_its_experts_are_edited_as_any() -> None:
    block, x = randomized(MixtureOfDecoders(6, experts=7, k=7, dtype=torch.float64)), rows(5, 6)
    x = x.double()
    (a,) = block.coefficients(x)
    want = block(x, coefficients=a * (torch.arange(7) != 3))
    before = block(x)
    with restored(block):
        silence_experts(block.decoder, 3)
        torch.testing.assert_close(block(x), want)
        assert not torch.allclose(want, before)
    torch.testing.assert_close(block(x), before, rtol=0, atol=0)


def test_it_starts_at_zero_and_learns_from_there() -> None:
    block = MixtureOfDecoders(8, experts=40, k=5)
    assert block.encoder.out_features == 32
    x = rows(16)
    assert not block(x).any()
    assert not block.decoder.factors.input.any()
    (a,) = block.coefficients(x)
    assert ((a > 0).sum(-1) == 5).all()
    block(x).sum().backward()
    assert block.decoder.factors.input.grad is not None
    assert block.decoder.factors.input.grad.abs().sum() > 0
    randomized(block).reset_parameters()
    assert not block(x).any()
    assert block.encoder.weight.abs().max() <= 8**-0.5


@pytest.mark.parametrize(
    ("experts", "k"), [(40, 5), (1000, 4), (1000, 64), (20, 20), ((30, 20), 5)]
)
def test_mixed_rows_of_c_start_around_one(experts: int | tuple[int, ...], k: int) -> None:
    torch.manual_seed(0)
    block = MixtureOfDecoders(24, 8, 200, experts=experts, k=k)
    x = rows(256, 24)

    def mixed() -> Tensor:
        levels = enumerate(block.coefficients(x))
        tables = [a @ getattr(block.decoder.factors, f"expert_{level}") for level, a in levels]
        return torch.stack(tables).prod(0)

    assert 0.85 < mixed().mean() < 1.15
    # experts differ from one another by as much as they share
    table = block.decoder.factors.expert_0 if isinstance(experts, int) else None
    assert table is None or 0.8 < table.std() / table.mean() < 1.2
    randomized(block).reset_parameters()
    assert 0.85 < mixed().mean() < 1.15


def test_it_has_as_many_parameters_as_a_transcoder() -> None:
    features, hidden, width = 8, 32, 64
    block = MixtureOfDecoders(features, hidden, experts=width - hidden, k=2)
    transcoder = [nn.Linear(features, width), nn.Linear(width, features)]
    want = sum(p.numel() for layer in transcoder for p in layer.parameters())
    assert block.num_parameters == want


def test_state_copies_and_dtypes() -> None:
    block = randomized(MixtureOfDecoders(6, experts=(5, 4), k=2, act_layer=nn.Mish, bias=False))
    x = rows(7, 6)
    want = block(x)
    other = MixtureOfDecoders(6, experts=(5, 4), k=2, act_layer=nn.Mish, bias=False)
    other.load_state_dict(block.state_dict())
    for each in (other, copy.deepcopy(block)):
        torch.testing.assert_close(each(x), want, rtol=0, atol=0)
    assert len(block.coefficients(x)) == 2
    half = copy.deepcopy(block).to(torch.bfloat16)
    assert half(x.to(torch.bfloat16)).dtype == torch.bfloat16
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    assert "act_layer='gelu'" in repr(MixtureOfDecoders(6, experts=4, k=1))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: MixtureOfDecoders(0, experts=4, k=1), SpecError, "in_features must be"),
        (lambda: MixtureOfDecoders(4, 0, experts=4, k=1), SpecError, "hidden_features must be"),
        (lambda: MixtureOfDecoders(4, experts=4, k=5), SpecError, "at most the experts"),
        (lambda: MixtureOfDecoders(4, experts=4, k=0), GateError, "k must be a positive"),
        (lambda: MixtureOfDecoders(4, experts=4, k=1, bias=2), SpecError, "bias must be"),
        (lambda: MixtureOfDecoders(4, experts=4, k=1, act_layer="x"), SpecError, "act_layer"),
        (lambda: MixtureOfDecoders(4, experts=4, k=1)(torch.ones(2, 3)), ShapeError, "3"),
    ],
)
def test_impossible_blocks(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_equal_experts_need_coefficients_that_sum_to_one() -> None:
    gate = Gate("relu_top_k", k=2)
    for call in (
        lambda: from_linear(nn.Linear(4, 4), 8, "hadamard", gate=gate),
        lambda: from_mlp(mlp(), 8, "hadamard", gate=gate),
        lambda: replace(nn.Sequential(nn.Linear(4, 4)), "0", experts=8, gate=gate),
    ):
        with pytest.raises(SpecError, match=r"sum to one.*got 'relu_top_k'.*distill"):
            call()
