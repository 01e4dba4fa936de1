"""Families of models with fewer experts: which can be merged or pruned, saved and opened again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tensormoe_torch.huggingface  # noqa: F401
from tensormoe.errors import SpecError
from tensormoe_torch import reduce_experts
from tests._compress_models import FAMILIES, family, logits
from tests._more_models import MORE, experts_of, low_rank
from tests._torch_moe import TOKENS

# called with a block of tokens per expert
BLOCKS = "llama4_text"
# units that can't be permuted
TURNS = "gpt_oss"
NAMES = sorted({*MORE, *FAMILIES} - {BLOCKS})


def model_of(name: str) -> Any:
    """A random model of a family, whose router has biases and scales where it can have them."""
    model = low_rank(name) if name in MORE else family(name)
    with torch.no_grad():
        for key, each in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith(("correction_bias", "expert_bias")):
                each.copy_(torch.tensor([0.0, -0.03, 0.01, 0.0]).reshape(each.shape))
            elif key.endswith("per_expert_scale"):
                each.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    return model


def opened(folder: Path) -> Any:
    """A model, all of whose weights were in the folder, and no others."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def generated(model: Any) -> list[int]:
    """A few tokens."""
    made = model.generate(TOKENS[:1, :6], max_new_tokens=4, do_sample=False, pad_token_id=0)
    return list(made[0].tolist())


@pytest.mark.parametrize("score", ["frequency", "reap"])
@pytest.mark.parametrize("name", NAMES)
def test_pruned(name: str, score: str, tmp_path: Path) -> None:
    model = model_of(name)
    original = copy.deepcopy(model)
    report = reduce_experts(model, TOKENS, keep=3, how="prune", score=score)
    assert all(each.experts == (4, 3) for each in report.modules)
    for each in report.modules:
        kept = [n for (n,) in each.groups]
        block = each.name.removesuffix(".experts")
        old, new = (held.get_submodule(block).state_dict() for held in (original, model))
        for key, array in new.items():
            whole, axes = old[key], [*range(old[key].ndim)]
            cut = [axis for axis in axes if array.shape[axis] != whole.shape[axis]]
            assert cut in ([], [axes[-1]], [0]), key
            wanted = whole.index_select(cut[0], torch.tensor(kept)) if cut else whole
            assert torch.equal(array, wanted), key
    model.save_pretrained(tmp_path)
    # a plain model
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    again = opened(tmp_path)
    assert type(again) is type(model)
    assert len(experts_of(again)) == len(report.modules)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-4)
    assert generated(again) == generated(model)


@pytest.mark.parametrize("groups", ["router", "outputs"])
@pytest.mark.parametrize("name", NAMES)
def test_merged(name: str, groups: str, tmp_path: Path) -> None:
    model = model_of(name)
    if name == TURNS:
        with pytest.raises(SpecError, match=r"take turns.*Pass align=False"):
            reduce_experts(model, TOKENS, keep=2, groups=groups)
    report = reduce_experts(model, TOKENS, keep=2, groups=groups, align=name != TURNS)
    assert all(each.experts == (4, 2) for each in report.modules)
    assert report.parameters[1] * 2 == report.parameters[0]
    model.save_pretrained(tmp_path)
    again = opened(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-4)
    assert generated(again) == generated(model)


@pytest.mark.parametrize(
    "options", [{}, {"groups": "outputs"}, {"how": "prune"}, {"how": "prune", "score": "reap"}]
)
def test_experts_that_get_a_block_of_tokens_each_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(
        SpecError, match=r"get a block of tokens each. Factorize them with compress"
    ):
        reduce_experts(low_rank(BLOCKS), TOKENS, keep=2, **options)


def test_what_a_router_holds_per_expert_must_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gemma4_text")
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("tensormoe_torch.compression._prune._around", lambda *_: [])
    with pytest.raises(SpecError, match=r"per_expert_scale' has shape \(4,\), .* gives it \(3,\)"):
        reduce_experts(model, TOKENS, keep=3, how="prune")
    after = model.state_dict()
    assert all(torch.equal(after[key], each) for key, each in before.items())
    assert model.config.num_experts == 4
