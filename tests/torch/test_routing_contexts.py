"""Routers steered and weights scaled by contexts: ours, and those of models of others."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensormoe.decomposition import Search
from tensormoe.editing import scale_routes, silence_routes, steer_routes
from tensormoe.errors import ShapeError, SpecError
from tensormoe.routing import Router
from tensormoe_torch import (
    CartesianMoE,
    DiverseMoE,
    MonetMoE,
    MultiGateMoE,
    ProductMoE,
    SoftMoE,
    SparseMoE,
    compress,
    reduce_experts,
    scale_experts,
    scaled_routing,
    silenced_routing,
    steer_router,
    steered_routing,
)
from tests._torch_moe import STACKED, TOKENS, Expert, OneByOne, sparse

INF = torch.inf
QUICK = Search(sweeps=2, starts=1, polish=0)
CONTEXTS: dict[str, Callable[[Any], Any]] = {
    "steered": lambda layer: steered_routing(layer, {1: 2.0, 2: -INF}),
    "scaled": lambda layer: scaled_routing(layer, {1: 3.0, 2: 0.0}),
}


def tokens(count: int = 20, features: int = 6) -> Tensor:
    made = torch.randn(count, features, generator=torch.Generator().manual_seed(1))
    return made.double()


def mixture(router: Router | str = "softmax", **more: Any) -> SparseMoE:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"experts": 5, "top_k": 2, "router": router, **more}
    return SparseMoE(6, 8, **sizes, dtype=torch.float64)


def block_of(model: Any) -> Any:
    """The last sparse block of a model of transformers."""
    return [each for each in model.modules() if hasattr(each, "experts") and each is not model][-1]


def called(experts: nn.Module, model: nn.Module, x: Any = TOKENS) -> tuple[Tensor, Tensor]:
    """Indices and weights that reach some experts."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args[1:]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[-1]


@pytest.mark.parametrize(
    "router",
    [
        Router(),
        Router("sigmoid", balance=0.01, scale=2.0),
        Router(renormalize=False, bias=True),
        Router(capacity=1.0),
    ],
    ids=str,
)
def test_sparse_mixtures_do_what_edits_of_their_records_do(router: Router) -> None:
    layer = mixture(router, shared_features=4, mix_shared=True).eval()
    buffers = dict(layer.router.named_buffers())
    for parameter in (*layer.parameters(), *buffers.values()):
        nn.init.normal_(parameter, std=0.3)
    x = tokens().reshape(4, 5, 6)
    plain, before = layer.route(x), layer(x)
    bias = buffers.get("choice_bias")
    wanted = {
        "steered": steer_routes(plain, {1: 2.0, 2: -INF}, router, choice_bias=bias),
        "scaled": scale_routes(plain, {1: 3.0, 2: 0.0}),
        "replaced": silence_routes(plain, [0, 3], router, choice_bias=bias),
        "empty": silence_routes(plain, [0, 3]),
    }
    contexts = {
        **CONTEXTS,
        "replaced": lambda layer: silenced_routing(layer, [0, 3]),
        "empty": lambda layer: silenced_routing(nn.ModuleList([layer]), (0, 3), replaced=False),
    }
    for name, context in contexts.items():
        with context(layer):
            torch.testing.assert_close(layer(x), layer(x, wanted[name]))
            assert torch.equal(layer.route(x).top_k_index, wanted[name].top_k_index)
        assert not torch.allclose(layer(x, wanted[name]), before)
        assert torch.equal(layer(x), before)
    index = wanted["replaced"].top_k_index
    assert not ((index == 0) | (index == 3)).any()


@pytest.mark.parametrize("name", STACKED)
def test_models_of_others_choose_by_their_own_rule(name: str) -> None:
    """Experts that are silent are not chosen, and tokens that did not use them choose the same."""
    model = sparse(name)
    for key, bias in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            # one for the choice alone, which must not bring a silent expert back
            bias.copy_(torch.linspace(0.9, 0.0, len(bias)))
    block = block_of(model)
    index, weights = called(block.experts, model)
    before = model(TOKENS).logits
    with silenced_routing(block, int(index[0, 0])):
        other, changed = called(block.experts, model)
        assert not (other == index[0, 0]).any()
        rows = (index != index[0, 0]).all(1)
        assert rows.any() or name == "deepseek_v3"
        assert torch.equal(other[rows].sort(1).values, index[rows].sort(1).values)
        assert not torch.equal(model(TOKENS).logits, before)
    with steered_routing(block, {2: 50.0}):
        other, _ = called(block.experts, model)
        assert (other == 2).any(1).all()
    with scaled_routing(block, {int(index[0, 0]): 0.5}):
        same, changed = called(block.experts, model)
    # the hook stands before the experts, where nothing is scaled yet
    assert torch.equal(same, index)
    assert torch.equal(changed, weights)
    assert torch.equal(model(TOKENS).logits, before)
    assert "forward" not in vars(block.experts)
    assert not any("forward" in vars(each) for each in model.modules())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_scaling_is_that_of_the_experts_outputs(name: str) -> None:
    model = sparse(name)
    block, wanted = block_of(model), sparse(name)
    with torch.no_grad():
        experts = block_of(wanted).experts
        experts.down_proj[1] *= 3.0
        experts.down_proj[2] = 0.0
        with CONTEXTS["scaled"](block):
            # routers make weights in float32
            torch.testing.assert_close(
                model(TOKENS).logits, wanted(TOKENS).logits, rtol=1e-4, atol=1e-5
            )


def test_steered_logits_are_those_of_a_router_with_a_bias() -> None:
    """A gate that is a linear layer, and a list of experts that are called one by one."""
    torch.manual_seed(0)
    model = OneByOne([Expert() for _ in range(4)]).double()
    wanted = copy.deepcopy(model)
    wanted.gate = nn.Linear(6, 4, dtype=torch.float64)
    x = tokens()
    with torch.no_grad():
        wanted.gate.weight.copy_(model.gate.weight)
        wanted.gate.bias.copy_(torch.tensor([0.0, 2.0, -INF, 0.0]))
        before = model(x)
        with CONTEXTS["steered"](model):
            torch.testing.assert_close(model(x), wanted(x))
        assert torch.equal(model(x), before)
        steer_router(wanted, {1: -2.0, 0: 1.0})
        assert wanted.gate.bias.tolist() == [1.0, 0.0, -INF, 0.0]
        scaled = copy.deepcopy(model)
        for index, factor in ((1, 3.0), (2, 0.0)):
            scaled.experts[index].w2.weight *= factor
        with CONTEXTS["scaled"](model):
            torch.testing.assert_close(model(x), scaled(x))
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("how", ["compress", "merge", "prune"])
def test_models_after_compression_are_steered(how: str) -> None:
    model = sparse("olmoe")
    if how == "compress":
        compress(model, "cp", rank=4, search=QUICK)
    else:
        reduce_experts(model, TOKENS, keep=3, how=how)
    block = block_of(model)
    before = model(TOKENS).logits
    index, _ = called(block.experts, model)
    silent = int(index[0, 0])
    with silenced_routing(block, silent):
        assert not (called(block.experts, model)[0] == silent).any()
        assert not torch.equal(model(TOKENS).logits, before)
    scaled = model(TOKENS).logits
    assert torch.equal(scaled, before)
    with silenced_routing(block, range(block_of(model).experts.num_experts - 1)):
        index, weights = called(block.experts, model)
        # one expert is left: the others are chosen with weight zero
        assert (weights[index != index.max()] == 0).all()
    if how == "compress":
        with scaled_routing(block, {silent: 2.0}):
            found = model(TOKENS).logits
        scale_experts(block.experts.down_proj, {silent: 2.0})
        torch.testing.assert_close(model(TOKENS).logits, found)


def test_text_is_generated_with_the_cache_as_without() -> None:
    model = sparse("mixtral", torch.float32)
    block = block_of(model)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = TOKENS[:1, :5]
    plain = model.generate(prompt, **options)
    for context in CONTEXTS.values():
        with context(block):
            cached = model.generate(prompt, **options)
            found = model.generate(prompt, **options, use_cache=False)
            logits = model(cached).logits
        assert torch.equal(cached, found)
        assert not torch.equal(logits, model(cached).logits)
    assert torch.equal(model.generate(prompt, **options), plain)


@pytest.mark.parametrize("context", CONTEXTS)
def test_models_that_are_compiled_already_compile_anew(context: str) -> None:
    block = block_of(sparse("mixtral", torch.float32))
    other = torch.randn(1, 9, block.gate.weight.shape[1])
    for layer, x, fullgraph in ((mixture(), tokens(), True), (block, other, False)):
        run: Any = torch.compile(layer, backend="eager", fullgraph=fullgraph)
        with torch.no_grad():
            before = run(x)
            torch.testing.assert_close(before, layer(x))
            with CONTEXTS[context](run):
                found, wanted = run(x), layer(x)
                fresh = torch.compile(layer, backend="eager", fullgraph=fullgraph)(x)
            torch.testing.assert_close(found, wanted)
            torch.testing.assert_close(fresh, wanted)
            assert not torch.allclose(found, before)
            torch.testing.assert_close(run(x), before)


def test_a_full_graph_of_a_steered_router_of_others_is_refused() -> None:
    gate = block_of(sparse("mixtral", torch.float32)).gate
    block = nn.Module()
    block.gate, block.experts = gate, block_of(sparse("mixtral", torch.float32)).experts
    block.forward = lambda x: block.gate(x)[2]  # type: ignore[method-assign]
    run: Any = torch.compile(block, backend="eager", fullgraph=True)
    x = torch.randn(9, gate.weight.shape[1])
    before = run(x)
    with (
        steered_routing(block, {1: 2.0}),
        pytest.raises(torch._dynamo.exc.TorchDynamoException, match="disable"),
    ):
        run(x)
    assert torch.equal(run(x), before)


def test_contexts_end_in_any_order_and_after_exceptions() -> None:
    block = block_of(sparse("mixtral"))
    x = torch.randn(1, 9, block.gate.weight.shape[1], dtype=torch.float64)
    before = block(x)
    first, second = steered_routing(block, {0: 9.0}), steered_routing([block, block], {0: 9.0})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with steered_routing(block, {0: 18.0}):
        wanted = block(x)
    second.__exit__(None, None, None)
    assert torch.equal(block(x), before)
    with steered_routing(block, {0: 36.0}):
        torch.testing.assert_close(block(x), wanted, atol=1e-6, rtol=0)

    def fail() -> None:
        with scaled_routing(block, {0: 0.0}), steered_routing(block, {1: 1.0}):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert torch.equal(block(x), before)


def test_what_others_put_in_its_place_stays() -> None:
    """As accelerate does: a forward of the instance, before or in between."""
    block = block_of(sparse("mixtral"))
    x = torch.randn(1, 9, block.gate.weight.shape[1], dtype=torch.float64)
    before, own, count = block(x), block.gate.forward, []

    def counted(hidden: Tensor) -> Any:
        count.append(1)
        return own(hidden)

    block.gate.forward = counted
    with steered_routing(block, {0: 3.0}):
        assert not torch.equal(block(x), before)
        inside = block.gate.forward
        block.gate.forward = lambda hidden: inside(hidden)
        assert not torch.equal(block(x), before)
    assert torch.equal(block(x), before)
    assert len(count) == 3


def test_copies_stay_steered_with_their_own_parameters() -> None:
    for block, name in (
        (block_of(sparse("mixtral")), "gate.weight"),
        (mixture(), "router.projection"),
    ):
        width = 6 if isinstance(block, SparseMoE) else block.gate.weight.shape[1]
        x = torch.randn(1, 9, width, dtype=torch.float64)
        with CONTEXTS["steered"](block), CONTEXTS["scaled"](block):
            wanted = block(x)
            made = [copy.deepcopy(block), pickle.loads(pickle.dumps(block))]
        assert not torch.equal(block(x), wanted)
        for each in made:
            assert torch.equal(each(x), wanted)
            with torch.no_grad():
                each.get_parameter(name).neg_()
            assert not torch.equal(each(x), wanted)


def test_other_mixtures() -> None:
    torch.manual_seed(0)
    x = tokens(7, 8)
    soft = SoftMoE(8, 16, experts=4, slots=2, dtype=torch.float64)
    routes, sets = soft.route(x[None]), x[None]
    with scaled_routing(soft, {1: 0.0, 2: 2.0}):
        torch.testing.assert_close(soft(sets), soft(sets, scale_routes(routes, {1: 0.0, 2: 2.0})))
    product = ProductMoE(8, experts=(4, 3), top_k=4, heads=2, dtype=torch.float64)
    index = product.route(x).top_k_index
    with silenced_routing(product, index[0, 0].tolist(), replaced=False):
        weights = product.route(x).top_k_weights
    assert torch.equal(weights == 0, torch.isin(index, index[0, 0]))
    diverse = DiverseMoE(8, [4, 8, 12, 16], top_k=2, dtype=torch.float64)
    with silenced_routing(diverse, 0):
        assert not (diverse.route(x).top_k_index == 0).any()
    cartesian = CartesianMoE(8, 16, experts=4, top_k=2, dtype=torch.float64)
    with silenced_routing(cartesian.second, 3):
        assert not (cartesian.route(x).second.top_k_index == 3).any()
    for layer, words in (
        (cartesian, "holds 2: 'first.router', 'second.router'"),
        (MultiGateMoE(8, 16, experts=4, tasks=2), "holds 0"),
        (nn.Linear(3, 3), "holds 0"),
        (soft, "got a SoftRouter of other logits"),
        (product, "got a MixtureRouter of other logits"),
    ):
        with pytest.raises(SpecError, match=words):
            steered_routing(layer, {0: 1.0})
    with pytest.raises(SpecError, match="products of one per level"):
        scaled_routing(MonetMoE(8, 4, experts=(3, 3), top_k=2), {0: 1.0})


def test_steering_for_good_is_saved(tmp_path: Any) -> None:
    layer = mixture(Router(bias=True)).eval()
    x = tokens()
    with CONTEXTS["steered"](layer):
        wanted = layer(x)
    steer_router(layer, {1: 2.0, 2: -INF})
    torch.testing.assert_close(layer(x), wanted)
    layer.save(tmp_path / "layer.safetensors")
    torch.testing.assert_close(SparseMoE.load(tmp_path / "layer.safetensors")(x), wanted)
    for each in (mixture(), block_of(sparse("mixtral"))):
        with pytest.raises(SpecError, match="must have a bias of its"):
            steer_router(each, {1: 2.0})


def test_steering_trains_what_it_passes_through() -> None:
    layer = mixture(Router(noise=0.5, balance=0.1))
    with steered_routing(layer, {0: 1.0}), scaled_routing(layer, {0: 2.0}):
        layer(tokens()).sum().backward()
    assert all(each.grad is not None for each in layer.parameters())


class Uncalled(OneByOne):
    """It takes its router's weight, and does not call it."""

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.gate.weight.T
        result = torch.zeros_like(x)
        for place, expert in enumerate(self.experts):
            result += logits.softmax(-1)[:, place, None] * expert(x)
        return result


class ByHand(nn.Linear):
    """A router without a linear product that can be seen."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_what_cannot_be_steered_is_refused() -> None:
    model, x = Uncalled([Expert() for _ in range(4)]), tokens().float()
    with (
        steered_routing(model, {0: 1.0}),
        pytest.raises(SpecError, match="must be called to be steered; Uncalled takes"),
    ):
        model(x)
    model(x)
    plain = OneByOne([Expert() for _ in range(4)])
    plain.gate = ByHand(6, 4, bias=False)
    with (
        steered_routing(plain, {0: 1.0}),
        pytest.raises(SpecError, match=r"its 4 logits by one linear product .*; ByHand makes 0"),
    ):
        plain(x)
    layer = mixture()
    for call, error, words in (
        (lambda: steered_routing(layer, {5: 1.0}), ShapeError, r"\[0, 5\); got 5"),
        (lambda: steered_routing(layer, {0: INF}), SpecError, "finite number, or -inf; got inf"),
        (lambda: steered_routing(layer, [1.0]), TypeError, "must map experts' indices"),  # type: ignore[arg-type]
        (lambda: silenced_routing(layer, range(5)), ShapeError, "at least one of the 5 experts"),
        (lambda: scaled_routing(layer, {0: -INF}), SpecError, "finite number; got -inf"),
        (lambda: steered_routing([], {}), SpecError, "at least one layer"),
        (lambda: steered_routing("mine", {}), TypeError, "must be modules; got str"),  # type: ignore[arg-type]
        (lambda: steered_routing(layer.router, {9: 0.0}), ShapeError, "got 9"),
        (lambda: scaled_routing(layer.experts, {0: 0.0}), SpecError, "got the experts alone"),
    ):
        with pytest.raises(error, match=words):
            call()
