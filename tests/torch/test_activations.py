"""Blocks with any activation: by name where it has one, kept as it is where not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tensormoe import CP
from tensormoe._config import ACTIVATIONS as NAMES
from tensormoe.errors import SpecError
from tensormoe.functional import BlockConfig
from tensormoe_torch import MuMoEMLP, from_mlp, parameter_groups
from tensormoe_torch._activations import ACTIVATIONS
from tests.torch._helpers import normal, randomize

NAMED: list[tuple[Any, str]] = [
    ("gelu", "gelu"),
    (nn.GELU, "gelu"),
    (nn.GELU(), "gelu"),
    (nn.GELU("tanh"), "gelu_tanh"),
    (F.gelu, "gelu"),
    (nn.ReLU(inplace=True), "relu"),
    (torch.relu, "relu"),
    (nn.SiLU, "silu"),
    (nn.Tanh(), "tanh"),
    (ACT2FN["gelu_new"], "gelu_tanh"),
    (ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
    (ACT2FN["gelu"], "gelu"),
    (ACT2FN["silu"], "silu"),
]
OWN: list[Any] = [
    nn.PReLU,
    nn.PReLU(init=0.0),
    nn.ReLU6(),
    nn.LeakyReLU(inplace=True),
    nn.ELU,
    ACT2FN["gelu_10"],
    ACT2FN["quick_gelu"],
    ACT2FN["relu2"],
    torch.sin,
    nn.Sequential(nn.Tanh(), nn.ReLU6()),
]


def shown(value: Any) -> str:
    """The name of a class or function: their text may hold an address."""
    return getattr(value, "__name__", str(value))


def block_of(act: Any, gated: bool = False, **options: Any) -> MuMoEMLP:
    made: MuMoEMLP = MuMoEMLP(
        6, 7, 5, act, experts=(3, 2), factorization=CP(4), gated=gated, **options
    )
    return made


def test_the_names_are_those_of_the_core() -> None:
    assert tuple(ACTIVATIONS) == NAMES


@pytest.mark.parametrize(("act", "name"), NAMED, ids=shown)
def test_one_with_a_name_is_saved_by_it(act: Any, name: str, tmp_path: Path) -> None:
    block = block_of(act)
    assert (block.config.act_layer, block.act) == (name, None)
    block.save(tmp_path / "block")
    assert MuMoEMLP.load(tmp_path / "block").config == block.config


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", OWN, ids=shown)
def test_another_one_is_kept_and_trained(act: Any, gated: bool, tmp_path: Path) -> None:
    block: MuMoEMLP = randomize(block_of(act, gated))
    function: Callable[[Tensor], Tensor] = block.act  # type: ignore[assignment]
    assert block.config.act_layer is None
    assert function is act or type(function) is act
    x = normal(4, 6, dtype=torch.float32)
    made = block.coefficients(x)
    middle = block.first(x, made).clone()
    middle = function(middle[:, :7].clone()) * middle[:, 7:] if gated else function(middle)
    torch.testing.assert_close(block(x), block.second(middle, made))
    torch.testing.assert_close(copy.deepcopy(block)(x), block(x))
    block(x).square().sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    assert block.num_parameters == sum(p.numel() for p in block.parameters())
    groups = parameter_groups(block, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len([*block.parameters()])
    with pytest.raises(SpecError, match=r"act_layer must be one of .* to be saved; .*state_dict"):
        block.save(tmp_path / "block")
    assert not (tmp_path / "block").exists()
    again = block_of(copy.deepcopy(act), gated)
    again.load_state_dict(block.state_dict())
    torch.testing.assert_close(again(x), block(x))


def test_a_class_is_made_as_the_parameters_are() -> None:
    block = block_of(nn.PReLU, dtype=torch.float64, device="meta")
    assert {(p.dtype, p.device.type) for p in block.parameters()} == {(torch.float64, "meta")}


def test_hooks_on_a_module_are_called() -> None:
    act, seen = nn.GELU(), []
    act.register_forward_hook(lambda *_: seen.append("act"))
    block_of(act)(torch.ones(2, 6))
    assert seen == ["act"]


def test_a_configuration_has_one_activation() -> None:
    own = block_of(torch.sin).config
    assert isinstance(own, BlockConfig)
    assert MuMoEMLP.of(own, act=torch.cos).act is torch.cos
    for config, act in ((own, None), (block_of("gelu").config, torch.sin)):
        with pytest.raises(SpecError, match="a block has one activation"):
            MuMoEMLP.of(config, act=act)
    with pytest.raises(SpecError, match="act must be a module or a function; got 'gelu'"):
        MuMoEMLP.of(own, act="gelu")


@pytest.mark.parametrize("gated", [False, True])
def test_compiled(gated: bool) -> None:
    block = block_of(nn.PReLU(), gated)
    x = torch.randn(4, 6)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("act", [nn.ReLU6(), ACT2FN["gelu_10"], nn.PReLU(init=0.0)], ids=shown)
def test_surgery_takes_the_module_itself(act: nn.Module) -> None:
    """Near zero, these are what others are everywhere."""
    mlp = nn.Sequential(nn.Linear(6, 8), act, nn.Linear(8, 5))
    block, fit = from_mlp(mlp, 4, rank=7)
    assert type(block.act) is type(act)
    assert block.act is not act
    x = 30.0 * torch.randn(5, 6)
    torch.testing.assert_close(block(x), mlp(x), rtol=1e-4, atol=1e-4)
    assert fit.error < 1e-5


def test_surgery_refuses_functions_that_it_only_sees_the_results_of() -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.fc2(F.relu6(self.fc1(x)))
            return result

    with pytest.raises(SpecError, match="the activation of mlp must be one of"):
        from_mlp(Clipped(), 4)
    clipped = Clipped()
    block, _ = from_mlp((clipped.fc1, F.relu6, clipped.fc2), 4, rank=7)
    x = 30.0 * torch.randn(5, 6)
    torch.testing.assert_close(block(x), clipped(x), rtol=1e-4, atol=1e-4)
