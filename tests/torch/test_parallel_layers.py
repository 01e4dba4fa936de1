"""Layers cut along one leg over processes: as the whole ones, and sending what plans say."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from tensormoe import CP, Dense, Factorization, Gate, LayerSpec, TensorRing, TopK
from tensormoe.errors import BackendError, ShapeError
from tensormoe.functional import EachExpert, LayerConfig
from tensormoe.gates import OneExpert
from tensormoe.planning import Routing
from tensormoe.planning._collectives import collectives
from tensormoe_torch import MuMoE, MuMoEEmbedding
from tensormoe_torch.parallel import parallelize
from tests._kinds import UNEVEN
from tests.torch._cut import assert_alike, assert_near, gradients, mesh, pair, sent, whole
from tests.torch._helpers import normal, randomize
from tests.torch._ranks import Ranks

# a multiple of 2, 4 and 8 each, and bonds that do not all divide
SIZES = (16, 24, (8, 16))
FORMS = ("dense", "top_k", "gate", "each", "one")
BATCHES = ((), (5,), (0,), (2, 3), (1, 0, 2))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A layer, a leg of it that divides whatever the devices are, and a call."""
    kind: Factorization = draw(st.sampled_from(UNEVEN))
    if draw(st.booleans()) and kind.bonds(2):
        kind = kind.with_rank(tuple(8 for _ in kind.bonds(2)))
    spec = LayerSpec(*SIZES, kind, bias=draw(st.booleans()))
    form = draw(st.sampled_from(FORMS))
    legs = [leg for leg in spec.network.shardable_legs if spec.network.sizes[leg] % 8 == 0]
    if form == "one":
        legs = [leg for leg in legs if not leg.startswith("n")]
    return {
        "spec": spec,
        "leg": draw(st.sampled_from(legs)),
        "form": form,
        "batch": draw(st.sampled_from(BATCHES)),
        "seed": draw(st.integers(0, 99)),
    }


def built(spec: LayerSpec, gate: Gate | None, dtype: torch.dtype, seed: int = 0) -> MuMoE:
    """A layer whose outputs are of the size of its inputs."""
    layer = MuMoE.of(LayerConfig(spec, gate), dtype=dtype)
    randomize(layer, seed)
    with torch.no_grad():
        for each in layer.factors.parameters():
            each.mul_(each.shape[-1] ** -0.5)
    return layer


def inputs_of(case: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Tensor], Any]:
    """Inputs by name, and the call with them."""
    batch, seed, form = case["batch"], case["seed"], case["form"]
    rng, experts = np.random.default_rng(seed), SIZES[2]
    x = normal(*batch, SIZES[0], seed=seed, dtype=dtype)
    if form == "gate":
        return {"x": x}, lambda layer, held: layer(held["x"])
    if form == "each":
        x = normal(*experts, 3, SIZES[0], seed=seed, dtype=dtype)
        return {"x": x}, lambda layer, held: layer.factors(held["x"], EachExpert())
    indices = [
        torch.tensor(rng.integers(0, n, (*batch, 1 if form == "one" else 3))) for n in experts
    ]
    if form == "one":
        ones = [OneExpert(each[..., 0]) for each in indices]
        return {"x": x}, lambda layer, held: layer(held["x"], ones)
    held = {"x": x}
    for level, count in enumerate(experts):
        values = rng.standard_normal((*batch, count)) * (rng.random((*batch, count)) < 0.6)
        if form == "top_k":
            values = values[..., :3]
        held[f"coefficients_{level}"] = torch.tensor(values).to(
            torch.promote_types(dtype, torch.float32)
        )

    def call(layer: Any, held: Any) -> Tensor:
        found = [held[f"coefficients_{level}"] for level in range(len(experts))]
        if form == "top_k":
            return layer(held["x"], [TopK(*each) for each in zip(indices, found, strict=True)])
        return layer(held["x"], found)

    return held, call


def compare(rank: int, case: dict[str, Any]) -> None:
    gate = Gate("softmax") if case["form"] == "gate" else None
    layer, cut = pair(built(case["spec"], gate, torch.float64, case["seed"]), case["leg"])
    held, call = inputs_of(case, torch.float64)
    assert_alike(layer, cut, call, held)


@given(cases())
def test_outputs_and_gradients(devices: Ranks, case: dict[str, Any]) -> None:
    devices(compare, case)


def compare_narrow(rank: int, kind: Factorization) -> None:
    spec = LayerSpec(*SIZES, kind)
    for leg in spec.network.shardable_legs:
        if spec.network.sizes[leg] % mesh().size() == 0:
            layer, cut = pair(built(spec, Gate("softmax"), torch.float32), leg)
            x = normal(7, SIZES[0], dtype=torch.float32)
            assert_alike(layer, cut, lambda each, held: each(held["x"]), {"x": x})


@pytest.mark.parametrize("kind", UNEVEN, ids=repr)
def test_float32(devices: Ranks, kind: Factorization) -> None:
    devices(compare_narrow, kind)


def compare_bytes(rank: int, case: dict[str, Any]) -> None:
    """What is sent is what the plan of a part says: kinds and bytes, in both directions."""
    layer = parallelize(built(case["spec"], None, torch.float32), mesh(), case["leg"])
    held, call = inputs_of(case, torch.float32)
    held = {name: each.requires_grad_() for name, each in held.items()}
    part = case["spec"].shard(case["leg"], mesh().size())
    routing = Routing(3) if case["form"] == "top_k" else Routing()
    batch = int(np.prod(case["batch"]))
    # without gradients too
    for training in (False, True):
        with sent() as calls, torch.set_grad_enabled(training):
            output = call(layer, held)
            if training:
                gradients(layer, held, output)
        wanted = collectives(part.network, batch, routing, training=training, whole=True)
        assert sorted(calls) == sorted((each.kind, each.bytes) for each in wanted)
    # factors that have the leg are as much smaller as there are devices
    for factor in case["spec"].network.all_factors:
        array: Any = layer.factors[factor.name]
        share = mesh().size() if case["leg"] in factor.legs else 1
        assert array.to_local().numel() * share == array.numel()
        assert array.to_local().untyped_storage().nbytes() == 4 * array.numel() // share


@given(cases().filter(lambda case: case["form"] in ("dense", "top_k") and 0 not in case["batch"]))
def test_what_is_sent(devices: Ranks, case: dict[str, Any]) -> None:
    devices(compare_bytes, case)


def compare_tables(rank: int, leg: str | None) -> None:
    table = randomize(MuMoEEmbedding(16, 8, (4, 8), TensorRing((2, 4, 8, 8)), dtype=torch.float64))
    ids = torch.tensor([[3, 0, 15], [7, 7, 8]])
    shares = {f"a{n}": normal(2, 3, count, seed=n) for n, count in enumerate((4, 8))}
    table, cut = pair(table, leg)
    call = lambda layer, held: layer(ids, [held["a0"], held["a1"]])  # noqa: E731
    assert_alike(table, cut, call, shares)
    with sent() as calls:
        cut(ids, [*shares.values()])
    assert len(calls) == 1


@pytest.mark.parametrize("leg", [None, "i", "o", "r2"])
def test_embeddings(devices: Ranks, leg: str | None) -> None:
    devices(compare_tables, leg)


def compare_placed(rank: int) -> None:
    """DTensors in, DTensors out; slices where a leg makes slices."""
    spec, x = LayerSpec(16, 24, 8, CP(8)), normal(2, 5, 16)
    for leg in ("r", "i", "o", "n0"):
        for gate in (None, Gate("softmax")):
            layer, cut = pair(built(spec, gate, torch.float64), leg)
            shares = () if gate else (normal(2, 5, 8, seed=1),)
            wanted = layer(x.requires_grad_(), *shares)
            wanted_grads = gradients(layer, {"x": x}, wanted)
            for placement in [Replicate()] + [Shard(2)] * (leg == "i"):
                placed = distribute_tensor(x.detach(), mesh(), [placement]).requires_grad_()
                with sent() as calls:
                    output = cut(placed, *shares)
                assert isinstance(output, DTensor)
                assert output.placements == ((Shard(2),) if leg == "o" else (Replicate(),))
                assert len(calls) == (leg != "o") + (gate is not None and placement == Shard(2))
                assert_near(output, wanted)
                found = gradients(cut, {"x": placed}, output.full_tensor())
                for name, grad in wanted_grads.items():
                    assert_near(found[name], grad, f"{leg} {name}")
    layer, cut = pair(built(spec, None, torch.float64), "n0")
    shares = normal(2, 5, 8, seed=1)
    placed = distribute_tensor(shares, mesh(), [Shard(2)])
    assert_near(cut(x, placed), layer(x, shares))
    for wrong in (Shard(0), Partial()):
        own = x.detach()[: 2 // mesh().size()] if wrong == Shard(0) else x.detach()
        placed = DTensor.from_local(own, mesh(), [wrong], shape=x.shape, stride=x.stride())
        with pytest.raises(BackendError, match="must be plain, or a DTensor on its mesh"):
            cut(placed, shares)


def test_placed_inputs(devices: Ranks) -> None:
    devices(compare_placed)


def compare_modes(rank: int) -> None:
    """No gradients, autocast, 16 bits, frozen factors, second derivatives."""
    spec, x = LayerSpec(16, 24, 8, TensorRing((2, 4, 8))), normal(3, 16, dtype=torch.float32)
    layer, cut = pair(built(spec, Gate("softmax"), torch.float32), "r2")
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert_near(cut(x), layer(x), tolerance=2e-6)
    with torch.autocast("cpu", torch.bfloat16):
        output = cut(x)
        assert output.dtype == torch.bfloat16
        assert_near(output.float(), layer(x).float(), tolerance=0.03)
    output.float().sum().backward()
    assert all(each.grad.dtype == torch.float32 for each in cut.parameters())
    narrow = [copy.deepcopy(each).to(torch.bfloat16) for each in (layer, cut)]
    outputs = [each(x.bfloat16()) for each in narrow]
    assert outputs[1].dtype == torch.bfloat16
    assert_near(outputs[1].float(), outputs[0].float(), tolerance=0.03)
    for each in (layer, cut):
        each.factors["expert_0"].requires_grad_(False)
    assert_alike(layer, cut, lambda layer, held: layer(held["x"]), {"x": x}, tolerance=4e-6)
    layer, cut = pair(built(spec, Gate("softmax"), torch.float64), "r2")
    twice = []
    for each in (layer, cut):
        held = {"x": normal(3, 16).requires_grad_()}
        (first,) = torch.autograd.grad(each(held["x"]).sin().sum(), held["x"], create_graph=True)
        twice.append(gradients(each, held, first))
    for name, grad in twice[0].items():
        assert_near(twice[1][name], grad, name, tolerance=1e-10)


def test_modes(ranks: Ranks) -> None:
    ranks(compare_modes)


def train(rank: int, kind: Factorization) -> None:
    spec, x = LayerSpec(16, 8, 8, kind), normal(32, 16, dtype=torch.float32)
    layer, cut = pair(built(spec, Gate("softmax"), torch.float32))
    target = normal(32, 8, seed=1, dtype=torch.float32)
    curves = []
    for each in (layer, cut):
        optimizer, losses = torch.optim.AdamW(each.parameters(), 1e-2), []
        for _ in range(10):
            optimizer.zero_grad()
            loss = (each(x) - target).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(each.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
    assert curves[0][-1] < curves[0][0]
    for wanted, found in zip(layer.parameters(), cut.parameters(), strict=True):
        assert_near(found, wanted.detach(), tolerance=1e-5)


@pytest.mark.parametrize("kind", [CP(8), TensorRing((2, 4, 8)), Dense()], ids=repr)
def test_ten_steps(devices: Ranks, kind: Factorization) -> None:
    devices(train, kind)


def compile_one(rank: int) -> None:
    x = normal(2, 3, 16, dtype=torch.float32)
    for leg in ("r", "o", "i", "n0"):
        cut = parallelize(
            built(LayerSpec(16, 8, 8, CP(8)), Gate("softmax"), torch.float32), mesh(), leg
        )
        fast = torch.compile(cut, backend="aot_eager", fullgraph=True)
        with warnings.catch_warnings():
            # the compiler makes an instance of every function that it meets
            warnings.filterwarnings("ignore", ".*autograd.function.Function'> should not")
            outputs = [each(x) for each in (cut, fast)]
        assert_near(outputs[1], outputs[0], tolerance=1e-5)
        found = [gradients(cut, {}, each) for each in outputs]
        for name, grad in found[0].items():
            assert_near(found[1][name], whole(grad), name, tolerance=1e-5)


def test_compiled(ranks: Ranks) -> None:
    ranks(compile_one)


def draw_noise(rank: int) -> None:
    """Processes draw different numbers; gates use those of the first."""
    torch.manual_seed(rank)
    gate = Gate("top_k", k=2, noise=1.0)
    cut = parallelize(built(LayerSpec(16, 8, 8, CP(8)), gate, torch.float64), mesh()).train()
    output = cut(normal(4, 16))
    everywhere = DTensor.from_local(output, mesh(), [Shard(0)]).full_tensor()
    assert torch.equal(everywhere, output.detach().repeat(mesh().size(), 1))


def test_noise_is_the_same_everywhere(devices: Ranks) -> None:
    devices(draw_noise)


def keep_whole(rank: int, folder: Any) -> None:
    """Configuration, text, cost, experts and files are those of the whole layer."""
    layer, cut = pair(built(LayerSpec(16, 8, (8, 2), CP(8)), Gate("softmax"), torch.float32))
    assert repr(cut) == repr(layer)
    assert cut.config == layer.config
    assert cut.cost(3, training=True) == layer.cost(3, training=True)
    assert cut.num_parameters == layer.num_parameters
    assert torch.equal(whole(cut.materialize()[0]), layer.materialize()[0])
    assert torch.equal(cut.expert(3, 1)[0], layer.expert(3, 1)[0])
    copied = copy.deepcopy(cut)
    x = normal(3, 16, dtype=torch.float32)
    assert torch.equal(copied(x), cut(x))
    cut.save(folder / "layer")
    again = MuMoE.load(folder / "layer").state_dict()
    assert all(torch.equal(again[name], each) for name, each in layer.state_dict().items())
    other = parallelize(MuMoE.of(layer.config), mesh(), "o")
    other.load_state_dict(again)
    assert_near(other(x), layer(x), tolerance=2e-6)
    cut.reset_parameters()
    assert not torch.equal(whole(cut.factors["input"]), layer.factors["input"])


def test_the_layer_stays_whole(devices: Ranks, tmp_path: Any) -> None:
    devices(keep_whole, tmp_path)


def refuse_calls(rank: int) -> None:
    layer = parallelize(built(LayerSpec(16, 8, 8, CP(8)), None, torch.float32), mesh(), "n0")
    x = normal(3, 16, dtype=torch.float32)
    with pytest.raises(ShapeError, match="rows of one expert each need all experts"):
        layer(x, OneExpert(torch.tensor([1, 2, 3])))
    with pytest.raises(ShapeError, match="must end in an axis of 16 features"):
        layer(x[:, :8], torch.ones(3, 8))
    layer.factors["input"] = torch.nn.Parameter(torch.ones(16, 8))
    with pytest.raises(BackendError, match="must be DTensors on its mesh; got a plain tensor"):
        layer(x, torch.ones(3, 8))


def test_calls_that_cannot_be(ranks: Ranks) -> None:
    ranks(refuse_calls)
