"""The PyTorch layers as modules: printed, copied, moved, saved, drawn anew."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tensormoe import CP, Dense, Gate, Hadamard, LayerSpec, TensorRing, TensorTrain, Tucker
from tensormoe.gates import activate
from tensormoe_torch import ExpertGate, MuMoE, MuMoEEmbedding, MuMoEMLP
from tests._torch_helpers import KINDS, build, normal, randomize


def layers() -> list[Any]:
    """Layers of every class, every option away from its default."""
    gate = Gate("top_k", k=2, normalization="batch", bias=True, momentum=0.3)
    return [
        MuMoE(6, 5, 4, "cp", rank=3),
        MuMoE(6, 5, (3, 4), TensorRing((2, 3, 4, 5)), bias=False, gate=gate, dtype=torch.float64),
        MuMoE(6, 5, (3, 2, 2), "hadamard", gate=None, init="paper", dtype=torch.bfloat16),
        MuMoEMLP(6, 8, 5, experts=(3, 2), factorization="tucker", rank=2, gate=gate),
        MuMoEMLP(6, experts=3, factorization=(CP(2), Dense()), act_layer="silu", drop=0.5),
        MuMoEEmbedding(9, 5, (3, 2), "tensor_train", rank=(2, 3, 4), dtype=torch.float64),
    ]


def run(layer: Any, seed: int = 0) -> Tensor:
    """Some output of any layer, in inference."""
    layer.eval()
    config = layer.config if not isinstance(layer, MuMoEMLP) else layer.config.first
    made = [
        normal(4, count, seed=seed + k, dtype=layer.dtype)
        for k, count in enumerate(config.spec.experts)
    ]
    if isinstance(layer, MuMoEEmbedding):
        return layer(torch.tensor([0, 3, 8, 3]), made)
    x = normal(4, config.spec.in_features, seed=seed, dtype=layer.dtype)
    return layer(x, made if layer.gate is None else None)


def same(left: nn.Module, right: nn.Module) -> bool:
    """The same tensors under the same names."""
    first, second = left.state_dict(), right.state_dict()
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name])
        for name in first
    )


@pytest.fixture(params=range(6), ids=lambda k: f"{type(layers()[k]).__name__}{k}")
def layer(request: pytest.FixtureRequest) -> Any:
    return randomize(layers()[request.param])


class TestEveryLayer:
    def test_repr_rebuilds_it(self, layer: Any) -> None:
        names = (MuMoE, MuMoEMLP, MuMoEEmbedding, CP, TensorRing, TensorTrain, Tucker)
        known = {each.__name__: each for each in (*names, Hadamard, Dense, Gate)}
        again = eval(repr(layer), known | {"torch": torch})
        assert type(again) is type(layer)
        assert again.config == layer.config
        assert again.dtype == layer.dtype
        assert repr(again) == repr(layer)

    def test_copies_are_its_own(self, layer: Any) -> None:
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert same(again, layer)
            assert again.config == layer.config
            assert torch.equal(run(again), run(layer))
            own = {each.data_ptr() for each in layer.state_dict().values()}
            assert own.isdisjoint(each.data_ptr() for each in again.state_dict().values())

    def test_saved_and_loaded_it_is_the_same(self, layer: Any, tmp_path: Path) -> None:
        layer.save(tmp_path / "layer.safetensors")
        again = type(layer).load(tmp_path / "layer.safetensors")
        assert same(again, layer)
        assert again.config == layer.config
        assert all(parameter.requires_grad for parameter in again.parameters())
        assert torch.equal(run(again), run(layer))

    def test_states_go_through_pytorchs_own_files(self, layer: Any, tmp_path: Path) -> None:
        torch.save(layer.state_dict(), tmp_path / "state.pt")
        again = type(layer).of(layer.config, dtype=layer.dtype)
        assert not same(again, layer)
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert same(again, layer)
        assert torch.equal(run(again), run(layer))

    def test_parameters_are_counted(self, layer: Any) -> None:
        assert layer.num_parameters == sum(each.numel() for each in layer.parameters())
        assert layer.cost(64).parameters == layer.num_parameters

    def test_costs_are_known(self, layer: Any) -> None:
        cost, training = layer.cost(64), layer.cost(64, training=True)
        assert 0 < cost.matmul_flops < training.matmul_flops
        assert 0 < cost.peak_memory < training.peak_memory

    def test_without_memory_first(self, layer: Any) -> None:
        """On the meta device, then in memory, then with values: as large models are built."""
        meta = type(layer).of(layer.config, device="meta", dtype=layer.dtype)
        assert {each.device.type for each in meta.state_dict().values()} == {"meta"}
        shapes = {name: each.shape for name, each in layer.state_dict().items()}
        assert {name: each.shape for name, each in meta.state_dict().items()} == shapes
        real = meta.to_empty(device="cpu")
        with torch.no_grad():
            for each in real.state_dict().values():
                each.fill_(torch.nan)
        real.reset_parameters()
        torch.manual_seed(0)
        assert torch.isfinite(run(real)).all()
        assert {each.device.type for each in real.state_dict().values()} == {"cpu"}

    def test_dtypes_change(self, layer: Any) -> None:
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            assert layer.to(dtype) is layer
            assert layer.dtype == dtype
            assert run(layer).dtype == dtype


def test_names_of_parameters_are_stable() -> None:
    """Checkpoints rely on the names, and saved states of optimizers on the order."""
    gate = Gate(normalization="batch", bias=True)
    layer = MuMoE(5, 4, (3, 2), Tucker(2), gate=gate)
    assert list(layer.state_dict()) == [
        "factors.bias",
        "factors.core",
        "factors.expert_0",
        "factors.expert_1",
        "factors.input",
        "factors.output",
        "gate.projection_0",
        "gate.bias_0",
        "gate.projection_1",
        "gate.bias_1",
        "gate.running_mean_0",
        "gate.running_variance_0",
        "gate.running_mean_1",
        "gate.running_variance_1",
    ]
    assert [name for name, _ in layer.named_buffers()] == list(layer.state_dict())[-4:]
    assert list(MuMoE(5, 4, 3, Dense(), gate=None).state_dict()) == [
        "factors.bias",
        "factors.weight",
    ]
    assert list(MuMoEMLP(5, experts=3, factorization="cp", rank=2, bias=False).state_dict()) == [
        "first.factors.expert_0",
        "first.factors.input",
        "first.factors.output",
        "second.factors.expert_0",
        "second.factors.input",
        "second.factors.output",
        "gate.projection_0",
    ]
    assert list(MuMoEEmbedding(5, 4, 3, "hadamard").state_dict()) == [
        "factors.expert_0",
        "factors.input",
    ]
    assert layer.spec == LayerSpec(5, 4, (3, 2), Tucker(2))


def test_states_are_loaded_strictly() -> None:
    """PyTorch's own error, which lists every difference."""
    layer, other = MuMoE(5, 4, 3, CP(2)), MuMoE(5, 4, 3, CP(3), bias=False)
    kept = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(other.state_dict())
    for name in ("factors.bias", "factors.input", "factors.output", "factors.expert_0"):
        assert name in str(caught.value)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gate\.running_mean_0"):
        layer.load_state_dict(MuMoE(5, 4, 3, CP(2), gate=Gate(normalization="batch")).state_dict())
    assert kept.keys() == layer.state_dict().keys()


def test_the_gate_is_a_module_to_look_into() -> None:
    layer = randomize(MuMoE(6, 5, 4, CP(2)))
    assert isinstance(layer.gate, ExpertGate)
    seen: list[Tensor] = []
    layer.gate.register_forward_hook(lambda module, given, made: seen.extend(made))
    x = normal(3, 6, dtype=torch.float32)
    layer(x)
    (want,) = layer.coefficients(x)
    assert torch.equal(seen[0], want)
    assert repr(layer.gate).startswith("ExpertGate(6, (4,), Gate(activation='entmax'")


class TestDevicesAndDtypes:
    def test_the_default_dtype_is_pytorchs(self) -> None:
        assert MuMoE(5, 4, 3, CP(2)).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            block = MuMoEMLP(5, experts=3, rank=2, gate=Gate(normalization="batch"))
            table = MuMoEEmbedding(5, 4, 3, rank=2)
            assert {each.dtype for each in block.state_dict().values()} == {torch.float64}
            assert table.dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)

    def test_the_default_device_is_pytorchs(self, tmp_path: Path) -> None:
        with torch.device("meta"):
            built = MuMoEMLP(5, experts=3, rank=2, gate=Gate(normalization="batch"))
        assert {each.device.type for each in built.state_dict().values()} == {"meta"}
        with torch.device("meta"):
            layer = MuMoE(5, 4, 3, CP(2), device="cpu")
        assert {each.device.type for each in layer.state_dict().values()} == {"cpu"}
        layer.save(tmp_path / "layer")
        with torch.device("meta"):
            again = MuMoE.load(tmp_path / "layer", device="cpu")
        assert same(again, layer)

    def test_a_meta_layer_knows_its_outputs_shape(self) -> None:
        layer = MuMoE(5, 4, (3, 2), TensorRing(2), device="meta")
        assert layer(torch.empty(7, 2, 5, device="meta")).shape == (7, 2, 4)
        table = MuMoEEmbedding(9, 4, 3, rank=2, device="meta")
        made = torch.empty(6, 3, device="meta")
        assert table(torch.empty(6, dtype=torch.int64, device="meta"), made).shape == (6, 4)


class TestFirstValues:
    @pytest.mark.parametrize("levels", [(4,), (4, 3)])
    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_experts_start_like_linear_layers(self, kind: Any, levels: tuple[int, ...]) -> None:
        """Every entry of 𝒲 and of the biases has variance 1/(3·in), whichever way it is drawn."""
        torch.manual_seed(0)
        layer = MuMoE(12, 8, levels, kind, dtype=torch.float64)
        weights, biases = [], []
        for _ in range(300):
            layer.reset_parameters()
            weight, bias = (each.detach() for each in layer.materialize())
            weights.append(float((weight**2).mean()))
            biases.append(float((bias**2).mean()))
        for samples in (weights, biases):
            error = np.std(samples) / np.sqrt(len(samples))
            assert error < 0.2 / 36
            assert abs(np.mean(samples) - 1 / 36) < 5 * error

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_rows_of_a_table_start_with_variance_one(self, kind: Any) -> None:
        """As those of ``torch.nn.Embedding``: each is used alone."""
        torch.manual_seed(0)
        table = MuMoEEmbedding(20, 8, (4, 2), kind, dtype=torch.float64)
        samples = []
        for _ in range(300):
            table.reset_parameters()
            samples.append(float((table.materialize()[0].detach() ** 2).mean()))
        error = np.std(samples) / np.sqrt(len(samples))
        assert error < 0.2
        assert abs(np.mean(samples) - 1) < 5 * error

    @pytest.mark.parametrize("init", ["variance", "paper"])
    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_both_schemes(self, kind: Any, init: str) -> None:
        torch.manual_seed(0)
        layer = MuMoE(6, 5, (3, 2), kind, init=init, gate=Gate(bias=True))
        before = copy.deepcopy(layer)
        assert torch.isfinite(layer(normal(4, 6, dtype=torch.float32))).all()
        layer.reset_parameters()
        assert not same(layer, before)
        torch.manual_seed(0)
        assert same(layer.__class__.of(layer.config, init), before)

    def test_seeds_are_pytorchs(self) -> None:
        made = []
        for seed in (7, 7, 8):
            torch.manual_seed(seed)
            made.append(MuMoEMLP(6, experts=(3, 2), factorization=TensorRing(3)))
        assert same(made[0], made[1])
        assert not same(made[0], made[2])

    def test_experts_start_with_equal_shares(self) -> None:
        layer = MuMoE(6, 5, (3, 2), CP(3), gate=Gate(bias=True))
        for level, found in enumerate(layer.coefficients(torch.ones(4, 6))):
            torch.testing.assert_close(
                found, torch.full((4, layer.spec.experts[level]), 1.0).softmax(-1)
            )

    def test_resetting_keeps_tensors_and_their_flags(self) -> None:
        layer = randomize(MuMoE(6, 5, 4, CP(2), gate=Gate(normalization="batch")))
        layer.factors["input"].requires_grad_(False)
        held = dict(layer.named_parameters())
        layer.reset_parameters()
        assert all(held[name] is each for name, each in layer.named_parameters())
        assert not layer.factors["input"].requires_grad
        assert layer.factors["output"].requires_grad
        assert torch.equal(layer.gate.running_mean_0, torch.zeros(4))
        assert torch.equal(layer.gate.running_variance_0, torch.ones(4))


@pytest.mark.parametrize("name", ["cp", "tensor_ring", "tensor_train", "tucker"])
def test_a_layer_is_as_large_as_the_linear_layer_by_default(name: str) -> None:
    layer, linear = MuMoE(128, 96, 64, name, device="meta"), nn.Linear(128, 96, device="meta")
    size = sum(each.numel() for each in linear.parameters())
    assert 0.9 * size <= layer.spec.num_parameters <= size
    assert layer.num_parameters == layer.spec.num_parameters + 128 * 64
    within = MuMoE(128, 96, 64, name, budget="linear", device="meta")
    assert 0.9 * size <= within.num_parameters <= size
    assert MuMoE(128, 96, 64, name, budget=9000, device="meta").num_parameters <= 9000


class TestBatchNorm:
    """The running statistics are those of ``nn.BatchNorm1d`` on the logits."""

    def layer(self, dtype: torch.dtype = torch.float64) -> MuMoE:
        gate = Gate(normalization="batch", momentum=0.25, bias=True)
        return build(LayerSpec(6, 5, (3, 4), CP(4)), gate, dtype)

    def twins(self, layer: MuMoE) -> list[nn.BatchNorm1d]:
        found = []
        for level, count in enumerate(layer.spec.experts):
            norm = nn.BatchNorm1d(count, layer.gate.gate.eps, 0.25, affine=False).double()
            norm.running_mean.copy_(getattr(layer.gate, f"running_mean_{level}"))
            norm.running_var.copy_(getattr(layer.gate, f"running_variance_{level}"))
            found.append(norm)
        return found

    @pytest.mark.parametrize("grad", [True, False])
    def test_it_is_pytorchs(self, grad: bool) -> None:
        layer = self.layer()
        norms = self.twins(layer)
        plain = Gate(normalization=None)
        for step in range(6):
            training = step not in (2, 5)
            layer.train(training)
            x = normal(10 + step, 6, seed=step) + 1
            with torch.set_grad_enabled(grad):
                made = layer.coefficients(x)
            for level, (norm, found) in enumerate(zip(norms, made, strict=True)):
                state = layer.gate.state_dict()
                logits = x @ state[f"projection_{level}"] + state[f"bias_{level}"]
                want = activate(plain, norm.train(training)(logits)).coefficients
                torch.testing.assert_close(found.detach(), want, rtol=0, atol=1e-9)
                for name, kept in (("mean", norm.running_mean), ("variance", norm.running_var)):
                    torch.testing.assert_close(state[f"running_{name}_{level}"], kept)

    def test_inference_leaves_them_and_sees_one_input_at_a_time(self) -> None:
        layer = self.layer().eval()
        x = normal(5, 6)
        old = copy.deepcopy(layer.state_dict())
        whole = layer(x)
        whole.sum().backward()
        layer.coefficients(x)
        assert all(torch.equal(old[name], each) for name, each in layer.state_dict().items())
        for row, output in zip(x, whole, strict=True):
            torch.testing.assert_close(layer(row), output, rtol=0, atol=1e-12)

    def test_training_sees_the_batch(self) -> None:
        layer, x = self.layer().train(), normal(5, 6)
        assert not torch.allclose(layer(x), layer(torch.cat([x, 3 * x]))[:5])

    def test_given_coefficients_leave_them(self) -> None:
        layer = self.layer().train()
        old = copy.deepcopy(layer.state_dict())
        layer(normal(5, 6), [normal(5, 3), normal(5, 4)])
        assert all(torch.equal(old[name], each) for name, each in layer.state_dict().items())

    def test_backward_after_another_forward_call(self) -> None:
        """The way back of a call uses what that call saw."""
        first, second = self.layer().train(), self.layer().train()
        x = normal(5, 6)
        output = first(x)
        first(normal(5, 6, seed=1))
        output.sum().backward()
        second(x).sum().backward()
        for ours, other in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, other.grad)
