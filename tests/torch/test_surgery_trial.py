"""Surgery with an example: tested, and undone bit by bit if the model fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensormoe.errors import SpecError
from tensormoe_torch import MuMoE, replace


class Reader(nn.Module):
    """A linear layer, and code that reads more of it than it calls."""

    def __init__(self, read: Callable[[nn.Linear], Any]) -> None:
        super().__init__()
        self.fc, self.read = nn.Linear(6, 6), read

    def forward(self, x: Tensor) -> Tensor:
        self.read(self.fc)
        result: Tensor = self.fc(x)
        return result


class Model(nn.Module):
    def __init__(self, read: Callable[[nn.Linear], Any]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.block = Reader(read)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.block(self.norm(self.first(x)))
        return result


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that surgery might touch, by identity where it must be the same object."""
    return {
        "modules": [(name, id(each)) for name, each in model.named_modules()],
        "parameters": [(name, id(each)) for name, each in model.named_parameters()],
        "buffers": [(name, id(each)) for name, each in model.named_buffers()],
        "modes": [each.training for each in model.modules()],
        "trained": [each.requires_grad for each in model.parameters()],
        "gradients": [each.grad for each in model.parameters()],
    }


def hooks_of(model: nn.Module) -> list[Any]:
    return [
        (id(each._forward_hooks), [*each._forward_hooks.values()], [*each._forward_pre_hooks])
        for each in model.modules()
    ]


READERS: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "an attribute": (
        lambda fc: fc.quant_state,
        r"AttributeError: 'MuMoE' object has no attribute 'quant_state'. It failed in 'block' "
        r"\(Reader.forward\), at `self.read\(self.fc\)`, which reads 'quant_state' of 'block.fc'",
    ),
    "values": (lambda fc: fc.weight.sum(), "SpecError: weight of MuMoE has no values: .*'block'"),
    "a product": (
        lambda fc: nn.functional.linear(torch.ones(2, 6), fc.weight, fc.bias),
        "SpecError: weight of MuMoE has no values",
    ),
    "its class": (lambda fc: nn.Linear.extra_repr(fc) + {}[0], "KeyError: 0. It failed in 'block'"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_model_that_fails_is_as_it_was(name: str) -> None:
    reads, message = READERS[name]

    def read(fc: nn.Linear) -> None:
        # what it reads is there on the linear layer, but for this
        if isinstance(fc, MuMoE):
            reads(fc)

    torch.manual_seed(0)
    model = Model(read).train()
    model.norm.eval()
    model.first.requires_grad_(False)
    seen: list[str] = []
    handle = model.block.fc.register_forward_hook(lambda *_: seen.append("hook"))
    model(torch.randn(4, 6)).sum().backward()
    before, hooks = snapshot(model), hooks_of(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SpecError, match=message) as caught:
        replace(model, nn.Linear, experts=3, example=torch.randn(4, 6))
    assert "in place of 'first', 'block.fc'" in str(caught.value)
    assert "Everything was taken back. Leave" in str(caught.value)
    assert snapshot(model) == before
    assert hooks_of(model) == hooks
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    seen.clear()
    model(torch.randn(4, 6))
    assert seen == ["hook"]
    handle.remove()
    model(torch.randn(4, 6))
    assert seen == ["hook"]


def test_an_interrupted_run_is_taken_back_too() -> None:
    def read(fc: nn.Linear) -> None:
        if isinstance(fc, MuMoE):
            raise KeyboardInterrupt

    model = Model(read)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        replace(model, "block.fc", experts=3, example=torch.randn(4, 6))
    assert snapshot(model) == before


def test_a_run_leaves_buffers_and_modes_alone() -> None:
    model = Model(lambda fc: None).train()
    state = {key: value.clone() for key, value in model.named_buffers()}
    objects = dict(model.named_buffers())
    replace(model, "block.fc", experts=3, example=torch.randn(4, 6))
    assert isinstance(model.block.fc, MuMoE)
    assert model.training
    for key, value in model.named_buffers():
        assert value is objects[key]
        assert torch.equal(value, state[key]), key


def test_a_layer_that_gets_another_dtype_is_named() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.fc(x.double() if isinstance(self.fc, MuMoE) else x)
            return result

    model = nn.Sequential(Casts())
    with pytest.raises(SpecError, match=r"ShapeError: .*float64.*new layer at '0.fc' was running"):
        replace(model, "0.fc", experts=3, example=torch.randn(4, 6))
    assert isinstance(model[0].fc, nn.Linear)


def test_parts_of_a_block_that_are_read() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.mlp(x.to(self.mlp[0].weight.dtype))
            return result

    model = Around()
    with pytest.raises(SpecError, match=r"TypeError: 'MuMoEMLP' object is not subscriptable"):
        replace(model, "mlp", experts=3, example=torch.randn(4, 6))
    replace(model, ["mlp.0", "mlp.2"], experts=3, example=torch.randn(4, 6))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_fused_paths_come_back() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, num_layers=1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.encoder(x)
            assert isinstance(self.encoder.layers[0].linear1, nn.Linear), "linear1 is gone"
            return result

    model = Around().eval()
    layer = model.encoder.layers[0]
    flags = layer.activation_relu_or_gelu, model.encoder.use_nested_tensor
    assert flags == (1, True)
    with pytest.raises(SpecError, match="AssertionError: linear1 is gone"):
        replace(model, "**.linear?", experts=3, example=torch.randn(2, 3, 8))
    assert (layer.activation_relu_or_gelu, model.encoder.use_nested_tensor) == flags


def test_shared_modules_come_back_at_each_place() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = nn.Sequential(self.a)

        def forward(self, x: Tensor) -> Tensor:
            assert not isinstance(self.a, MuMoE)
            result: Tensor = self.b(self.a(x))
            return result

    model = Twice()
    old = model.a
    with pytest.raises(SpecError, match="in place of 'a'; AssertionError"):
        replace(model, ["a", "b.0"], experts=3, example=torch.randn(4, 6))
    assert model.a is old
    assert model.b[0] is old
