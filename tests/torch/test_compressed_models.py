"""Compressed models of transformers at work: compiled, with caches of keys, in bfloat16."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import MixtralConfig, MixtralForCausalLM, StaticCache

from tensormoe import BaseDelta, LowRank, SharedBasis, Tucker
from tensormoe.decomposition import Search
from tensormoe_torch import compress
from tensormoe_torch.compression import FactorizedExperts
from tests._torch_moe import rebuilt

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]

QUICK = Search(sweeps=2, polish=0)
KINDS = [LowRank(30), SharedBasis((1, 30)), BaseDelta(16), Tucker((4, 34, 34))]
TOKENS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _apart() -> Iterator[None]:
    """Every test compiles anew: the number of variants of one function is limited."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(kind: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A compressed Mixtral, and the dense one rebuilt from its factors."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(vocab_size=64, max_position_embeddings=64, **sizes, **heads)
    model = MixtralForCausalLM(config).eval()
    for name, each in model.named_parameters():
        if "experts" in name or "lm_head" in name:
            # large enough that experts matter for what comes next
            nn.init.normal_(each, std=0.3)
    original = copy.deepcopy(model)
    compress(model, kind, search=QUICK)
    wanted: Any = rebuilt(original, model)
    model.generation_config.pad_token_id = wanted.generation_config.pad_token_id = 0
    return model.to(dtype).requires_grad_(False), wanted.to(dtype).requires_grad_(False)


def experts_of(model: Any) -> FactorizedExperts:
    found: FactorizedExperts = model.model.layers[0].mlp.experts
    return found


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_and_generation_are_those_of_dense_experts(kind: Any) -> None:
    model, wanted = pair(kind)
    assert experts_of(model)._sorts(torch.empty(9, 64), 18) == (not isinstance(kind, Tucker))
    torch.testing.assert_close(model(TOKENS).logits, wanted(TOKENS).logits, atol=1e-4, rtol=1e-4)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    dense = wanted.generate(TOKENS, **options)
    assert len({*dense[0].tolist()}) > 5
    for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(TOKENS, **options, **cache), dense), cache


@pytest.mark.parametrize("kind", [BaseDelta(16), Tucker((4, 34, 34))], ids=str)
def test_whole_model_compiles_in_one_graph(kind: Any) -> None:
    model, wanted = pair(kind)
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    made = []
    # the compiler takes a part of an array for another kind of input
    for tokens in (TOKENS, TOKENS[:, :5].contiguous()):
        found = compiled(tokens, use_cache=False).logits
        dense = wanted(tokens, use_cache=False).logits
        torch.testing.assert_close(found, dense, atol=1e-4, rtol=1e-4)
        made.append(counter.frame_count)
    assert len(set(made)) == 1, "nothing is compiled again"


def test_inductor_runs_experts() -> None:
    model, wanted = pair(BaseDelta(16))
    run = torch.compile(experts_of(model), fullgraph=True)
    x = torch.randn(9, 64)
    index, weights = torch.rand(9, 4).topk(2).indices, torch.rand(9, 2)
    dense = wanted.model.layers[0].mlp.experts(x, index, weights)
    torch.testing.assert_close(run(x, index, weights), dense, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run(x[:1], index[:1], weights[:1]), dense[:1], atol=1e-4, rtol=1e-4)


def test_one_token_at_a_time_with_a_static_cache_in_one_graph() -> None:
    model, wanted = pair(LowRank(30))
    cache = StaticCache(config=model.config, max_cache_len=16)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    # newer releases have another name for it
    names = inspect.signature(MixtralForCausalLM.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    found = []
    for place in range(6):
        position = torch.tensor([[place]])
        given = {name: cache, "position_ids": position}
        call = model if place == 0 else step
        found.append(call(TOKENS[:1, place : place + 1], **given).logits)
    dense = wanted(TOKENS[:1, :6]).logits
    torch.testing.assert_close(torch.cat(found, 1), dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_bfloat16_is_as_near_as_dense_bfloat16(kind: Any) -> None:
    exact, _ = pair(kind)
    model, wanted = pair(kind, torch.bfloat16)
    torch.manual_seed(1)
    x = torch.randn(50, 64)
    index, weights = torch.rand(50, 4).topk(2).indices, torch.rand(50, 2)
    true = experts_of(exact)(x, index, weights)
    given = x.bfloat16(), index, weights.bfloat16()

    def error(call: Callable[..., torch.Tensor]) -> float:
        return float((call(*given).float() - true).norm() / true.norm())

    assert experts_of(model)(*given).dtype == torch.bfloat16
    assert error(experts_of(model)) < 2 * error(experts_of(wanted)) < 0.05


def test_what_hangs_on_layers_is_called() -> None:
    model, _ = pair(BaseDelta(16))
    experts = experts_of(model)
    given = torch.randn(9, 64), torch.rand(9, 4).topk(2).indices, torch.rand(9, 2)
    wanted = experts(*given)
    seen = []
    down: Any = experts.down_proj
    for module in (down, down.factors):
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(experts(*given), wanted, atol=1e-5, rtol=1e-5)
        assert seen
        handle.remove()
        seen.clear()
    doubled = down.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    torch.testing.assert_close(experts(*given), 2 * wanted, atol=1e-5, rtol=1e-5)
    doubled.remove()
    torch.testing.assert_close(experts(*given), wanted)


@pytest.mark.parametrize("kind", [BaseDelta(16), SharedBasis((1, 30))], ids=str)
def test_gradients_are_those_of_dense_experts(kind: Any) -> None:
    model, wanted = pair(kind)
    experts = experts_of(model).requires_grad_(True)
    x = torch.randn(30, 64, requires_grad=True)
    given = x, torch.rand(30, 4).topk(2).indices, torch.rand(30, 2)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    found = [torch.autograd.grad(call(*given).square().sum(), x)[0] for call in (experts, compiled)]
    (dense,) = torch.autograd.grad(experts_of(wanted)(*given).square().sum(), x)
    for each in found:
        torch.testing.assert_close(each, dense, atol=1e-2, rtol=1e-3)
    compiled(*given).square().sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in experts.parameters())


def test_indices_out_of_range_are_refused() -> None:
    model, _ = pair(LowRank(30))
    index = torch.full((3, 2), 4)
    with pytest.raises(Exception, match=r"in \[0, 4\)|4 "):
        experts_of(model)(torch.randn(3, 64), index, torch.rand(3, 2))
