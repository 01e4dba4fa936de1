"""Mixtures from linear layers and MLPs: they compute what those compute, as far as ranks allow."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Gate,
    Hadamard,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe_torch import MuMoE, MuMoEMLP, from_linear, from_mlp

# name -> a rank that holds any matrix (9 + 1, 6) and one that holds rank 4 at most
RANKS: dict[str, tuple[Any, Any]] = {
    "cp": (6, 4),
    "tensor_ring": (3, None),
    "tensor_train": (6, 4),
    "tucker": (6, 4),
    "hadamard": (None, None),
    "dense": (None, None),
}
EXPERTS = [5, (4, 3), (2, 3, 2)]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}


def coefficients(layer: MuMoE | MuMoEMLP, shape: tuple[int, ...]) -> list[Tensor]:
    """Sparse, different for each token, and summing to one."""
    spec = layer.spec if isinstance(layer, MuMoE) else layer.first.spec
    rng = np.random.default_rng(0)
    made = []
    for count in spec.experts:
        values = rng.dirichlet(np.ones(count), shape) * (rng.random((*shape, count)) < 0.5)
        values[..., 0] += 1e-3
        values /= values.sum(axis=-1, keepdims=True)
        made.append(torch.tensor(values, dtype=layer.dtype))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("experts", EXPERTS, ids=str)
@pytest.mark.parametrize("name", RANKS)
def test_a_layer_equals_the_linear_one_for_any_coefficients(
    name: str, experts: Any, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(9, 6, bias, dtype=dtype)
    layer, fit = from_linear(linear, experts, name, rank=RANKS[name][0])
    x = torch.randn(4, 3, 9, dtype=dtype)
    given = coefficients(layer, (4, 3))
    for result in (layer(x), layer(x, given)):
        torch.testing.assert_close(result, linear(x), rtol=0, atol=TOLERANCE[dtype])
    assert fit.error < TOLERANCE[dtype]
    assert fit.parameters_before == sum(p.numel() for p in linear.parameters())
    assert fit.parameters_after == sum(p.numel() for p in layer.parameters())
    assert (fit.expert_rank, fit.expert_span) == (layer.spec.expert_rank, layer.spec.expert_span)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("experts", EXPERTS, ids=str)
@pytest.mark.parametrize("name", ["cp", "tensor_ring", "tensor_train", "tucker"])
def test_too_small_a_rank_gives_the_truncated_svd(name: str, experts: Any, bias: bool) -> None:
    torch.manual_seed(1)
    levels = 1 if isinstance(experts, int) else len(experts)
    rank = RANKS[name][1] or ((2,) * (levels + 2))
    linear = nn.Linear(9, 6, bias, dtype=torch.float64)
    layer, fit = from_linear(linear, experts, name, rank=rank)
    table = linear.weight.detach().numpy().T
    if bias:
        table = np.vstack([table, linear.bias.detach().numpy()])
    left, values, right = np.linalg.svd(table, full_matrices=False)
    missing = np.linalg.norm(values[4:]) / np.linalg.norm(values)
    assert fit.error == pytest.approx(missing, rel=1e-9)
    x = torch.randn(5, 9, dtype=torch.float64)
    rows = np.hstack([x.numpy(), np.ones((5, 1))]) if bias else x.numpy()
    wanted = rows @ (left[:, :4] * values[:4]) @ right[:4]
    result = layer(x, coefficients(layer, (5,)))
    np.testing.assert_allclose(result.detach().numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_layers(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    linear = nn.Linear(16, 8).to(dtype)
    layer, fit = from_linear(linear, (4, 2), "cp", rank=8, noise=0.1)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert fit.error < 2 * torch.finfo(dtype).eps
    x = torch.randn(5, 16).to(dtype)
    result = layer(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result, linear(x), rtol=0, atol=16 * torch.finfo(dtype).eps)
    result.float().sum().backward()


def test_nothing_is_shared_with_the_linear_layer() -> None:
    torch.manual_seed(3)
    for factorization in (
        CP(4),
        TensorRing(2),
        TensorTrain(4),
        Tucker(4),
        SharedBasis(4),
        BaseDelta(2),
        SharedDelta(2),
        Hadamard(),
        Dense(),
    ):
        linear = nn.Linear(4, 4)
        before = copy.deepcopy(linear.state_dict())
        layer, _ = from_linear(linear, 3, factorization, noise=0.1)
        storages = [p.untyped_storage().data_ptr() for p in (*layer.parameters(), linear.weight)]
        assert len(set(storages)) == len(storages)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        assert all(torch.equal(value, before[key]) for key, value in linear.state_dict().items())
        assert linear.weight.grad is None


@pytest.mark.parametrize(
    "gate", ["entmax", "softmax", Gate(normalization="batch"), Gate(bias=True)], ids=repr
)
def test_noise_keeps_the_output_under_a_fresh_gate(gate: Any) -> None:
    torch.manual_seed(4)
    linear = nn.Linear(9, 6)
    layer, fit = from_linear(linear, (4, 3), "tensor_ring", rank=3, gate=gate, noise=0.5)
    x = torch.randn(8, 9)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=1e-4)
    weights = layer.materialize()[0].detach().reshape(12, -1)
    apart = (weights - weights.mean(dim=0)).norm(dim=1) / weights.mean(dim=0).norm()
    assert 0.2 < apart.square().mean().sqrt() < 0.8
    assert fit.noise == 0.5


def test_experts_part_with_noise_and_not_without() -> None:
    x, wanted = torch.randn(64, 8).double(), torch.randn(64, 4).double()
    for noise, parted in ((0.0, False), (0.1, True)):
        torch.manual_seed(5)
        layer, _ = from_linear(nn.Linear(8, 4).double(), 6, "cp", rank=4, noise=noise)
        F.mse_loss(layer(x), wanted).backward()
        assert layer.gate is not None
        gate = layer.gate.projection_0.grad.abs().max()
        rows = layer.factors["expert_0"].grad
        assert (gate > 1e-3) == parted
        # a fresh gate is even: what sets experts apart comes through the gate
        torch.testing.assert_close(rows, rows[:1].expand_as(rows))


def test_only_noise_draws_numbers() -> None:
    linear = nn.Linear(8, 4)
    state = torch.get_rng_state()
    first, _ = from_linear(linear, 6)
    assert torch.equal(torch.get_rng_state(), state)
    again, _ = from_linear(linear, 6)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_modes_gates_and_budgets() -> None:
    linear = nn.Linear(64, 32).eval()
    layer, fit = from_linear(linear, 16, gate=None)
    assert layer.gate is None
    assert not layer.training
    assert fit.parameters_after <= fit.parameters_before
    assert 0 < fit.error < 1
    assert "expert rank" in str(fit)
    smaller, small = from_linear(linear, 16, "tensor_ring", budget=1500)
    assert 1300 <= smaller.num_parameters <= 1500
    assert small.error > fit.error
    kept = from_linear(nn.Linear(4, 4).train(), 2, CP(4))[0]
    assert kept.training
    again = MuMoE.of(layer.config)
    again.load_state_dict(layer.state_dict())


def test_conv1d_is_stored_the_other_way() -> None:
    torch.manual_seed(6)
    conv = Conv1D(6, 9)
    nn.init.normal_(conv.bias)
    layer, fit = from_linear(conv, 4, "cp", rank=6)
    x = torch.randn(2, 3, 9)
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-4)
    assert (layer.spec.in_features, layer.spec.out_features) == (9, 6)
    assert fit.error < 1e-5


class Mlp(nn.Module):
    """As timm's, with names, places of dropout and the activation to choose."""

    def __init__(self, act: Any, drop: tuple[float, float] = (0.0, 0.0), bias: bool = True) -> None:
        super().__init__()
        self.fc2 = nn.Linear(12, 6)  # made before fc1: the order is that of the run
        self.fc1 = nn.Linear(6, 12, bias)
        self.act = act
        self.drop1, self.norm, self.drop2 = nn.Dropout(drop[0]), nn.Identity(), nn.Dropout(drop[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class Pair(nn.Module):
    """Two linear layers in modules of their own, as ViT's intermediate and output."""

    def __init__(self) -> None:
        super().__init__()
        self.intermediate = nn.Sequential(nn.Linear(6, 12))
        self.output = nn.Sequential(nn.Linear(12, 6), nn.Dropout(0.0))

    def forward(self, hidden_states: Tensor) -> Tensor:
        result: Tensor = self.output(F.silu(self.intermediate(hidden_states)))
        return result


def blocks() -> dict[str, Any]:
    return {
        "sequential": nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)),
        "in place": nn.Sequential(nn.Linear(6, 12), nn.SiLU(inplace=True), nn.Linear(12, 6)),
        "dropout": nn.Sequential(
            nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 6), nn.Dropout(0.2)
        ),
        "functional": Mlp(F.relu),
        "one bias": Mlp(nn.Tanh(), bias=False),
        "pair": Pair(),
        "gelu_new": Mlp(ACT2FN["gelu_new"]),
        "gelu_pytorch_tanh": Mlp(ACT2FN["gelu_pytorch_tanh"]),
        "gelu": Mlp(ACT2FN["gelu"]),
        "narrow": Mlp(ACT2FN["gelu_new"]).to(torch.bfloat16),
    }


ACTS = {
    "sequential": "gelu",
    "in place": "silu",
    "dropout": "relu",
    "functional": "relu",
    "one bias": "tanh",
    "pair": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "narrow": "gelu_tanh",
}


@pytest.mark.parametrize("name", ACTS)
def test_a_block_equals_the_mlp(name: str) -> None:
    torch.manual_seed(7)
    mlp = blocks()[name]
    dtype = next(mlp.parameters()).dtype
    assert mlp.training
    block, fit = from_mlp(mlp, (3, 2), "cp", rank=7, noise=0.2)
    assert block.training
    assert mlp.training
    assert all(module.training for module in mlp.modules())
    assert block.config.act_layer == ACTS[name]
    assert block.config.drop == (0.2 if name == "dropout" else 0.0)
    assert block.dtype == dtype
    x = torch.randn(2, 5, 6).to(dtype)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    exact, _ = from_mlp(mlp, (3, 2), "cp", rank=7)
    given = coefficients(exact, (2, 5))
    wanted = mlp.eval()(x)
    torch.testing.assert_close(exact.eval()(x, given), wanted, rtol=0, atol=tolerance)
    torch.testing.assert_close(block.eval()(x), wanted, rtol=0, atol=tolerance)
    assert fit.parameters_before == sum(p.numel() for p in mlp.parameters())
    assert fit.parameters_after == sum(p.numel() for p in block.parameters())
    assert len(fit.parts) == 2
    block(x).float().square().sum().backward()


def test_blocks_from_parts() -> None:
    torch.manual_seed(8)
    first, second = nn.Linear(6, 12), Conv1D(5, 12)
    x = torch.randn(4, 6)
    acts = [("gelu", F.gelu), (nn.ReLU, F.relu), (nn.SiLU(), F.silu), (torch.tanh, torch.tanh)]
    for act, function in acts:
        pair = CP(7), Hadamard()
        block, _ = from_mlp((first, act, second), 4, pair, drop=0.25)
        assert block.config.drop == 0.25
        assert block.second.spec.factorization == Hadamard()
        torch.testing.assert_close(block.eval()(x), second(function(first(x))), rtol=0, atol=1e-5)


def test_dropout_of_two_rates_has_to_be_chosen() -> None:
    assert from_mlp(Mlp(nn.GELU(), (0.1, 0.1)), 4)[0].config.drop == 0.1
    assert from_mlp(Mlp(nn.GELU(), (0.0, 0.3)), 4, drop=0.3)[0].config.drop == 0.3


def test_trying_a_block_out_leaves_no_trace() -> None:
    mlp = Mlp(nn.GELU())
    mlp.drop1.eval()
    seen: list[str] = []
    for name, module in mlp.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    modes = [module.training for module in mlp.modules()]
    state = torch.get_rng_state()
    from_mlp(mlp, 4)
    assert not seen
    assert [module.training for module in mlp.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in mlp.parameters())
    mlp(torch.randn(2, 6))
    assert "fc1" in seen
