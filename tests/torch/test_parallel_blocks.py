"""Blocks cut along their hidden features: one sum over the devices per call."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.utils import prune

from tensormoe import CP, Dense, Factorization, TopK
from tensormoe.errors import SpecError
from tensormoe.planning._block_cost import block_collectives
from tensormoe_torch import (
    CartesianMoE,
    MuMoE,
    MuMoEEmbedding,
    MuMoEMLP,
    SparseMoE,
    replace_expert,
    restored,
    scale_experts,
    silence_experts,
)
from tensormoe_torch.parallel import MuMoEParallel, parallelize
from tests._kinds import UNEVEN
from tests.torch._cut import (
    assert_alike,
    assert_near,
    call,
    gradients,
    mesh,
    pair,
    scaled,
    sent,
    whole,
)
from tests.torch._helpers import normal, randomize
from tests.torch._ranks import Ranks


def block(kind: Factorization, gated: bool, **options: Any) -> MuMoEMLP:
    found: dict[str, Any] = {"gate": "softmax", "dtype": torch.float64, "act_layer": "silu"}
    made: MuMoEMLP = scaled(
        MuMoEMLP(12, 16, 10, experts=(3, 2), factorization=kind, gated=gated, **(found | options))
    )
    return made


def compare_block(rank: int, kind: Factorization, gated: bool) -> None:
    whole_block, cut = pair(block(kind, gated))
    for batch in ((5,), (2, 3), (0,)):
        assert_alike(whole_block, cut, call, {"x": normal(*batch, 12)})
    given = {"x": normal(4, 12)} | {f"a{n}": normal(4, c, seed=n) for n, c in enumerate((3, 2))}
    layer = lambda each, held: each(held["x"], (held["a0"], held["a1"]))  # noqa: E731
    assert_alike(whole_block, cut, layer, given)
    chosen = [TopK(torch.tensor([[1], [0]]), torch.tensor([[0.5], [2.0]]).double())] * 2
    assert_near(cut(normal(2, 12), chosen), whole_block(normal(2, 12), chosen))
    part = whole_block.config.shard(mesh().size())
    for training in (False, True):
        held = {name: each.requires_grad_() for name, each in given.items()}
        with sent() as calls, torch.set_grad_enabled(training):
            output = layer(cut, held)
            if training:
                gradients(cut, held, output)
        wanted = block_collectives(
            part.first.spec.network, part.second.spec.network, 4, training=training, itemsize=8
        )
        assert sorted(calls) == sorted((each.kind, each.bytes) for each in wanted)
        assert training or len(calls) == 1


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", UNEVEN, ids=repr)
def test_blocks(devices: Ranks, kind: Factorization, gated: bool) -> None:
    devices(compare_block, kind, gated)


def keep_block(rank: int, folder: Any) -> None:
    """Files, experts and memory of a gated block."""
    for kind in (CP(8), Dense()):
        made, cut = pair(block(kind, True))
        cut.save(folder / "block")
        again = MuMoEMLP.load(folder / "block").state_dict()
        assert all(torch.equal(again[name], each) for name, each in made.state_dict().items())
        other = parallelize(MuMoEMLP.of(made.config, dtype=torch.float64), mesh())
        other.load_state_dict(again)
        assert_near(other(normal(3, 12)), made(normal(3, 12)))
        # what is gathered elsewhere opens in a whole block
        gathered = {name: whole(each) for name, each in cut.state_dict().items()}
        fresh = MuMoEMLP.of(made.config, dtype=torch.float64)
        fresh.load_state_dict(gathered)
        assert torch.equal(fresh(normal(3, 12)), made(normal(3, 12)))
        for part, wanted in zip(cut.expert(1, 0), made.expert(1, 0), strict=True):
            assert torch.equal(part[0], wanted[0])
        assert repr(cut) == repr(made)
        for name in ("first.factors.output", "second.factors.input"):
            if kind == CP(8):
                array = cut.get_parameter(name)
                share = array.to_local().numel() * mesh().size()
                assert share == made.get_parameter(name).numel()
        cut.reset_parameters()


def test_whole_from_outside(devices: Ranks, tmp_path: Any) -> None:
    devices(keep_block, tmp_path)


def drop_some(rank: int) -> None:
    """Hidden features are dropped independently, outputs alike on all devices."""
    for seed in (0, rank):
        torch.manual_seed(seed)
        _, cut = pair(block(CP(8), False, drop=0.5).train())
        output = cut(normal(64, 12))
        everywhere = DTensor.from_local(output, mesh(), [Shard(0)]).full_tensor()
        assert torch.equal(everywhere, output.repeat(mesh().size(), 1))
        assert 0.4 < (output == 0).double().mean() < 0.6
    # with equal draws, slices do not have equal masks
    torch.manual_seed(0)
    masks = cut.boundary.dropout(torch.ones(100, 4), 0.5, slices=True) > 0
    other = DTensor.from_local(masks.int(), mesh(), [Shard(1)]).full_tensor()
    assert not torch.equal(other[:, :4], other[:, 4:8])
    torch.manual_seed(0)
    assert torch.equal(other.bool(), torch.rand(100, 4 * mesh().size()) >= 0.5)


def test_dropout(devices: Ranks) -> None:
    devices(drop_some)


class Model(nn.Module):
    """Layers of everybody's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = MuMoEEmbedding(16, 8, 4, rank=8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.block = MuMoEMLP(8, 16, experts=4, rank=8, gate="softmax", gated=True)
        self.head = MuMoE(8, 16, 4, rank=8, gate="softmax")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids, torch.full((*ids.shape, 4), 0.25))
        x = x + self.down(F.gelu(self.up(x)))
        made: Tensor = self.head(x + self.block(x))
        return made


def train_model(rank: int) -> None:
    torch.manual_seed(0)
    model, cut = pair(Model())
    assert type(cut.up.weight) is nn.Parameter
    ids, target = torch.randint(16, (4, 6)), torch.randint(16, (4, 6))
    curves = []
    for each in (model, cut):
        optimizer = torch.optim.AdamW(each.parameters(), 3e-3)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.cross_entropy(each(ids).flatten(0, 1), target.flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


def test_a_model_of_many_layers(devices: Ranks) -> None:
    devices(train_model)


def compile_cold(rank: int) -> None:
    """Before any eager call."""
    blocks: list[Any] = [
        MuMoEMLP(8, 16, experts=4, rank=8, gate="softmax", gated=True),
        SparseMoE(8, 8, experts=4, top_k=2),
    ]
    for module in blocks:
        randomize(module)
        cut = parallelize(copy.deepcopy(module), mesh())
        fast = torch.compile(cut, backend="aot_eager", fullgraph=True)
        x = normal(5, 8, dtype=torch.float32)
        with warnings.catch_warnings():
            # the compiler makes an instance of every function that it meets
            warnings.filterwarnings("ignore", ".*autograd.function.Function'> should not")
            output = fast(x)
        assert_near(output, module(x), tolerance=1e-5)
        wanted = gradients(module, {}, module(x))
        for name, grad in gradients(cut, {}, output).items():
            assert_near(grad, wanted[name], name, tolerance=1e-5)


def test_compiled(ranks: Ranks) -> None:
    ranks(compile_cold)


def start_on_meta(rank: int) -> None:
    """Cut before anything is allocated; initial values are those of one process."""

    def build() -> nn.ModuleList:
        return nn.ModuleList(
            [
                MuMoEMLP(8, 16, experts=4, rank=8, gated=True, gate="softmax"),
                MuMoE(8, 8, 4, rank=8),
                SparseMoE(8, 8, experts=4, top_k=2),
            ]
        )

    with torch.device("meta"):
        model = build()
    parallelize(model, mesh()).to_empty(device="cpu")
    plain = build()
    x = normal(3, 8, dtype=torch.float32)
    for one, other in zip(model, plain, strict=True):
        for each in (one, other):
            torch.manual_seed(0)
            each.reset_parameters()
        assert_near(one(x), other(x), tolerance=4e-6)


def test_on_the_meta_device(ranks: Ranks) -> None:
    ranks(start_on_meta)


def _blocks() -> list[MuMoEMLP]:
    kinds = (CP(8), Dense())
    return [MuMoEMLP(12, 16, 10, experts=4, factorization=each, gated=True) for each in kinds]


def edit(rank: int) -> None:
    """Editing experts of cut layers edits those of whole ones."""
    made: list[Any] = [scaled(each) for each in (MuMoE(8, 8, 4, rank=8), *_blocks())]
    for module in made:
        module.double()
        cut = parallelize(copy.deepcopy(module), mesh())
        x = normal(3, module.in_features)
        with restored(cut):
            silence_experts(cut, [0])
        assert_near(cut(x), module(x))
        for each in (module, cut):
            scale_experts(each, {1: 0.5})
            replace_expert(each, 2, source=1)
            layer = each if isinstance(each, MuMoE) else each.first
            replace_expert(layer, 0, normal(layer.in_features, layer.out_features, seed=2))
        assert_near(cut(x), module(x), tolerance=1e-8)


def test_editing(ranks: Ranks) -> None:
    ranks(edit)


class Half(nn.Module):
    """Half of a transformer's block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.block = MuMoEMLP(8, 16, experts=4, rank=8, gate="softmax", gated=True)
        self.layer = MuMoE(8, 8, 4, rank=8, gate="softmax")

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(self.block(self.down(F.gelu(self.up(x)))))
        return made


def style(rank: int) -> None:
    """Beside PyTorch's own parallel layers, parallel over the sequence between them."""
    plain = randomize(Half()).double()
    wanted = plain(x := normal(2, 8, 8).requires_grad_())
    wanted_grads = gradients(plain, {"x": x}, wanted)
    for layout in (Replicate(), Shard(1)):
        cut = randomize(Half()).double()
        plan = {
            "up": ColwiseParallel(),
            "down": RowwiseParallel(output_layouts=layout),
            "block": MuMoEParallel(input_layouts=layout, output_layouts=layout),
            "layer": MuMoEParallel("r", input_layouts=layout, use_local_output=False),
        }
        parallelize_module(cut, mesh(), plan)
        with sent() as calls:
            output = cut(x)
        kinds = [kind for kind, _ in calls]
        scattered = ["reduce-scatter", "all-gather"] * 2 + ["all-reduce"]
        assert kinds == (["all-reduce"] * 3 if layout == Replicate() else scattered)
        assert_near(output, wanted)
        found = gradients(cut, {"x": x}, output.full_tensor())
        for name, grad in wanted_grads.items():
            assert_near(found[name], grad, name)


def test_a_style(devices: Ranks) -> None:
    devices(style)


def refuse(rank: int) -> None:
    mixing = MuMoEMLP(6, 8, experts=2, rank=2, act_layer=nn.Softmax(-1))
    learned = MuMoEMLP(6, 8, experts=2, rank=2, act_layer=nn.PReLU())
    odd = MuMoEMLP(6, 7, experts=2, rank=2)
    tied = nn.ModuleList([MuMoE(4, 4, 2, rank=2), MuMoE(4, 4, 2, rank=2)])
    tied[1].factors["input"] = tied[0].factors["input"]
    twice = parallelize(MuMoE(4, 4, 2, rank=2), mesh())
    computed = MuMoE(4, 4, 2, rank=2)
    nn.utils.parametrizations.orthogonal(computed.factors, "input")
    more = MuMoE(4, 4, 2, rank=2)
    more.factors.register_parameter("more", nn.Parameter(torch.ones(1)))
    pruned = MuMoE(4, 4, 2, rank=2)
    prune.l1_unstructured(pruned.factors, "input", 0.5)
    cases: list[tuple[nn.Module, str | None, str]] = [
        (mixing, None, "must make each hidden feature of its own"),
        (learned, None, "must have no parameters; got PReLU at 'act'"),
        (odd, None, "must be a multiple of the 2 devices; got 7"),
        (tied, None, "must belong to it alone"),
        (twice, None, "must be whole to be cut; got 'expert_0' as a DTensor"),
        (computed, None, "stored under their own names"),
        (pruned, None, "stored under their own names"),
        (more, None, "must have its own parameters alone; got more besides"),
        (MuMoE(4, 4, 2, rank=2), "z", "must have a leg 'z' to be cut; got a MuMoE with legs 'n0'"),
        (MuMoE(5, 4, 2, rank=2), "i", "must be a multiple of the 2 devices; got 5"),
        (odd, "r", "with legs .*'hidden'"),
        (nn.Linear(2, 2), None, "must have a layer of the library"),
        (CartesianMoE(6, 8, experts=4, top_k=2), None, "one of SparseMoE, .*; got CartesianMoE"),
    ]
    for module, leg, message in cases:
        before = [type(each) for each in module.parameters()]
        with pytest.raises(SpecError, match=message):
            parallelize(module, mesh(), leg)
        assert [type(each) for each in module.parameters()] == before
    # nothing is cut if anything is refused
    model = nn.ModuleList([MuMoE(4, 4, 2, rank=2), odd])
    with pytest.raises(SpecError, match="multiple of the 2 devices"):
        parallelize(model, mesh())
    assert not any(isinstance(each, DTensor) for each in model.parameters())
    flat = torch.distributed.device_mesh.init_device_mesh("cpu", (1, 2))
    named = torch.distributed.device_mesh.init_device_mesh(
        "cpu", (1, 2), mesh_dim_names=("data", "tensor")
    )
    for wrong, message in ((flat, "must have one dimension"), (named, r"as mesh\['tensor'\]")):
        with pytest.raises(SpecError, match=message):
            parallelize(MuMoE(4, 4, 2, rank=2), wrong)
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh"):
        parallelize(MuMoE(4, 4, 2, rank=2), 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module"):
        parallelize(2, mesh())  # type: ignore[type-var]


def test_what_cannot_be_cut(ranks: Ranks) -> None:
    ranks(refuse)
