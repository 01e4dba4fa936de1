"""Layers under tools that hook into modules: pruning, adapters, forward-mode derivatives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp
from torch.nn.utils import parametrize, prune

from tensormoe import CP, Gate, LayerSpec, TensorRing
from tensormoe.errors import BackendError, CheckpointError, ShapeError, SpecError
from tensormoe_torch import (
    BACKEND,
    ExpertGate,
    Factors,
    MuMoE,
    MuMoEEmbedding,
    MuMoEMLP,
    per_sample_gradients,
    silence_experts,
)
from tests._kinds import GATES
from tests.torch._helpers import build, normal, randomize


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, array: Tensor) -> Tensor:
        return 0.5 * array


def plain(layer: MuMoE) -> MuMoE:
    """A layer that has what another one computes as parameters."""
    again = MuMoE.of(layer.config, dtype=layer.dtype)
    with torch.no_grad():
        for name, array in layer.factors.by_name().items():
            again.get_parameter(name).copy_(array)
        for name in again.gate.state_dict():
            again.gate.get_parameter(name).copy_(getattr(layer.gate, name))
    return again.train(layer.training)


# PyTorch's own, when the first dual tensor is made
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("gate", GATES, ids=repr)
def test_forward_derivatives(gate: Gate, gradients: bool) -> None:
    """By the input and by parameters, as ``torch.func`` has them."""
    layer = build(LayerSpec(6, 5, (3, 2), TensorRing(2)), gate).eval()
    x, by_x = normal(4, 7, 6), normal(4, 7, 6, seed=1)
    held = {name: each.detach() for name, each in layer.named_parameters()}
    along = {name: normal(*each.shape, seed=2) for name, each in held.items()}

    def call(held: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(layer, held, (x,))

    value, wanted = jvp(call, (held, x), (along, by_x))
    by_input = jvp(lambda x: call(held, x), (x,), (by_x,))[1]
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(each, along[name]) for name, each in held.items()}
        found = forward_ad.unpack_dual(call(duals, forward_ad.make_dual(x, by_x)))
        torch.testing.assert_close(found.primal, value)
        torch.testing.assert_close(found.tangent, wanted)
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, by_x))).tangent
        torch.testing.assert_close(tangent, by_input)


def test_pruned_layers_train() -> None:
    """The mask holds at every step, as in a linear layer, and what is pruned stays zero."""
    layer = build(LayerSpec(6, 5, 3, CP(4)), Gate(bias=True))
    prune.l1_unstructured(layer.factors, "input", 0.5)
    prune.l1_unstructured(layer.gate, "projection_0", 0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    x = normal(2, 4, 6)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        found = layer(x)
        assert (layer.factors["input"] == 0).sum() == 12
        torch.testing.assert_close(found, plain(layer)(x))
    prune.remove(layer.factors, "input")
    prune.remove(layer.gate, "projection_0")
    torch.testing.assert_close(layer(x), found)
    assert {*layer.state_dict()} == {*layer.config.parameter_shapes()}


def test_parametrized_layers_run() -> None:
    layer = build(LayerSpec(6, 5, 3, CP(4)), Gate())
    wanted = plain(layer)
    parametrize.register_parametrization(layer.factors, "output", Halved())
    with torch.no_grad():
        wanted.factors["output"].mul_(0.5)
    x = normal(4, 6)
    torch.testing.assert_close(layer(x), wanted(x))
    torch.testing.assert_close(layer.expert(1), wanted.expert(1))
    layer(x).sum().backward()
    assert layer.factors.parametrizations["output"].original.grad.abs().sum() > 0


def computed() -> dict[str, Any]:
    """Layers with a parameter each that is computed from others."""
    made = {name: randomize(MuMoE(6, 5, 3, CP(4))) for name in ("pruned", "parametrized", "gate")}
    prune.l1_unstructured(made["pruned"].factors, "input", 0.5)
    parametrize.register_parametrization(made["parametrized"].factors, "bias", Halved())
    prune.random_unstructured(made["gate"].gate, "projection_0", 0.5)
    made["block"] = randomize(MuMoEMLP(6, 5, experts=3, rank=2))
    parametrize.register_parametrization(made["block"].second.factors, "input", Halved())
    return made


@pytest.mark.parametrize("name", computed())
def test_computed_parameters_are_not_saved(name: str, tmp_path: Path) -> None:
    layer = computed()[name]
    wrong = {
        "pruned": "'factors.input' computed from 'factors.input_orig', 'factors.input_mask'",
        "parametrized": "'factors.bias' computed from 'factors.parametrizations.bias.original'",
        "gate": "'gate.projection_0' computed from 'gate.projection_0_orig'",
        "block": "'second.factors.input' computed from 'second.factors.parametrizations",
    }
    with pytest.raises(CheckpointError, match=rf"own names to be saved; got {wrong[name]}"):
        layer.save(tmp_path / "layer")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(SpecError, match="own names to be changed; got a computed"):
        layer.reset_parameters()


def test_parameters_besides_are_not_lost(tmp_path: Path) -> None:
    layer = MuMoE(6, 5, 3, CP(4))
    layer.scale = nn.Parameter(torch.ones(5))
    with pytest.raises(CheckpointError, match="of a MuMoE alone; got 'scale' besides"):
        layer.save(tmp_path / "layer")
    table = MuMoEEmbedding(6, 5, 3, CP(4))
    table.factors["scale"] = nn.Parameter(torch.ones(5))
    with pytest.raises(CheckpointError, match=r"alone; got 'factors\.scale' besides"):
        table.save(tmp_path / "layer")


def test_classes_with_a_constructor_of_their_own(tmp_path: Path) -> None:
    class Named(MuMoE):
        def __init__(self, name: str, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.name = name

    class Whole(Named):
        @classmethod
        def of(
            cls, config: Any, init: Any = "variance", device: Any = None, dtype: Any = None
        ) -> Any:
            spec = config.spec
            return cls(
                "again",
                spec.in_features,
                spec.out_features,
                spec.experts,
                spec.factorization,
                device=device,
                dtype=dtype,
            )

    Named("first", 6, 5, 3, CP(4)).save(tmp_path / "layer")
    with pytest.raises(TypeError, match=r"constructor of MuMoE; got .*Named with one of its own"):
        Named.load(tmp_path / "layer")
    assert Whole.load(tmp_path / "layer").name == "again"


def test_tensors_without_values_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="must have values to be written; got one on the meta"):
        MuMoE(6, 5, 3, rank=2, device="meta").save(tmp_path / "layer")
    with torch._subclasses.FakeTensorMode(), pytest.raises(BackendError, match="got a FakeTensor"):
        BACKEND.to_bytes(torch.ones(3))


def test_results_are_no_views() -> None:
    """``fully_shard`` registers hooks on results; a change in place would drop them from a view."""
    x = normal(2, 3, 6).requires_grad_()
    layer = build(LayerSpec(6, 5, 3, CP(4)), Gate())
    for result in (layer(x), layer(x[0]), *layer.coefficients(x), layer(x, layer.gate(x))):
        assert not result._is_view()
    y = layer(x)
    y += 1.0
    y.sum().backward()


def test_factors_alone_say_what_they_need() -> None:
    layer = MuMoE(6, 5, (3, 2), rank=2)
    with pytest.raises(ShapeError, match="an input and 2 coefficients, one per level; got 0"):
        layer.factors(torch.ones(2, 6))


def test_adapters_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    layer = randomize(MuMoE(6, 5, 3, CP(4)))
    model = nn.Sequential(layer)
    x = normal(4, 7, 6, dtype=torch.float32)
    before = model(x).detach()
    names = ["0.factors.input", "0.factors.expert_0"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_parameters=names)
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(adapted(x), before)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(x).square().mean().backward()
        optimizer.step()
    after = adapted(x).detach()
    assert not torch.allclose(after, before)
    with pytest.raises(CheckpointError, match=r"got 'factors\.expert_0', .*merge_and_unload"):
        layer.save(tmp_path / "layer")
    for edit in (lambda: silence_experts(layer, 0), lambda: layer.expert(0)):
        with pytest.raises(SpecError, match="adapter off first"):
            edit()
    adapted.save_pretrained(tmp_path / "adapter")
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(x), before)
    merged = adapted.merge_and_unload()[0]
    torch.testing.assert_close(merged(x), after)
    merged.save(tmp_path / "layer")
    assert torch.equal(MuMoE.load(tmp_path / "layer")(x), merged(x))


@pytest.mark.parametrize("shape", [(4, 6), (4, 7, 6)], ids=str)
def test_gradients_of_single_samples(shape: tuple[int, ...]) -> None:
    """As one backward pass for each sample has them, from what engines see of a module."""
    layer = build(LayerSpec(6, 5, 3, TensorRing(2)), Gate(bias=True))
    layer.factors["output"].requires_grad_(False)
    x = normal(*shape)
    coefficients = layer.gate(x)
    y = layer.factors(x, *coefficients)
    backprops = [normal(*y.shape, seed=1), normal(*coefficients[0].shape, seed=2)]
    found = {
        **per_sample_gradients(layer.factors, [x, *coefficients], backprops[0]),
        **per_sample_gradients(layer.gate, [x], backprops[1]),
    }
    assert {*found} == {each for each in layer.parameters() if each.requires_grad}
    for sample in range(len(x)):
        (part,) = layer.gate(x[sample : sample + 1])
        result = layer.factors(x[sample : sample + 1], part.detach())
        loss = (result[0] * backprops[0][sample]).sum() + (part[0] * backprops[1][sample]).sum()
        wanted = torch.autograd.grad(loss, [*found])
        for gradients, alone in zip(found.values(), wanted, strict=True):
            torch.testing.assert_close(gradients[sample], alone)


def test_gates_that_have_no_gradients_of_single_samples() -> None:
    x = torch.ones(4, 6)
    for layer in (
        MuMoE(6, 5, (3, 2), rank=2),
        MuMoE(6, 5, 3, rank=2, gate=Gate(normalization="batch")),
        MuMoE(6, 5, 3, rank=2, gate=Gate("top_k", k=2, noise=0.5)),
        MuMoE(6, 5, 3, rank=2, gate=Gate("top_k", k=2, balance=0.01)),
    ):
        with pytest.raises(SpecError, match="need a gate of one level, without batch norm, noise"):
            per_sample_gradients(layer.gate, [x], torch.ones(4, 3))


def test_opacus() -> None:
    pytest.importorskip("opacus")
    from opacus import GradSampleModule
    from opacus.grad_sample import register_grad_sampler

    register_grad_sampler([Factors, ExpertGate])(per_sample_gradients)
    block = randomize(MuMoEMLP(6, 7, 5, experts=3, rank=4, dtype=torch.float64))
    x = normal(4, 7, 6)
    wanted = []
    for sample in x:
        loss = block(sample).square().sum()
        wanted.append(torch.autograd.grad(loss, [*block.parameters()]))
    # hooks for the backward pass warn where no input has a gradient
    x.requires_grad_()
    GradSampleModule(block, loss_reduction="sum")(x).square().sum().backward()
    for parameter, alone in zip(block.parameters(), zip(*wanted, strict=True), strict=True):
        torch.testing.assert_close(parameter.grad_sample, torch.stack(alone))
