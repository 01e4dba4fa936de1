"""Adapters on the experts of transformers' models: memory, formula, folders, merging."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tensormoe.errors import SpecError
from tensormoe_torch import ResidualExperts, replace
from tensormoe_torch.adapters import (
    AdaptedExperts,
    add_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
)
from tensormoe_torch.compression import FactorizedExperts
from tests._compress_models import family
from tests.huggingface._models import compressed, gpt2, load

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "granitemoe"]
TOKENS = torch.arange(24).reshape(2, 12)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits  # type: ignore[no-any-return]


def _moved(model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.normal_().mul_(0.3)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_experts(name: str, tmp_path: Path) -> None:
    model = family(name)
    plain = copy.deepcopy(model)
    memory = {each.data_ptr() for each in model.parameters()}
    model, report = add_adapters(model, rank=3)
    # smaller than the number of experts, which no adapter per expert is
    assert {each.config.layer.spec.num_experts for each in report.adapters} == {4}
    adapted = [each for each in model.modules() if isinstance(each, AdaptedExperts)]
    bases = [each.base for one in adapted for each in one.projections.values()]  # type: ignore[union-attr]
    assert {e.data_ptr() for each in bases for e in each.parameters()} <= memory  # type: ignore[union-attr,operator]
    torch.testing.assert_close(_logits(model), _logits(plain), rtol=1e-4, atol=1e-5)
    _moved(model)
    found = _logits(model)
    assert (found - _logits(plain)).abs().max() > 1e-2
    # W_n + ΔW_n by hand, in the model's own parameters
    wanted = copy.deepcopy(plain)
    with torch.no_grad():
        for path in report.names:
            f = model.get_submodule(path).adapter.factors
            delta = torch.einsum("nr,ir,or->nio", f["expert_0"], f["input"], f["output"])
            own = wanted.get_parameter(path.replace(".projections.", "."))
            own.add_(delta if own.shape == delta.shape else delta.transpose(1, 2))
    torch.testing.assert_close(found, _logits(wanted), rtol=1e-3, atol=1e-4)
    save_adapters(model, tmp_path / "file")
    again = load_adapters(copy.deepcopy(plain), tmp_path / "file")
    assert torch.equal(_logits(again), found)
    merge_adapters(model)
    torch.testing.assert_close(_logits(model), found, rtol=1e-3, atol=1e-4)
    for key, values in model.state_dict().items():
        torch.testing.assert_close(values, wanted.state_dict()[key], rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "folder")
    assert torch.equal(_logits(load(tmp_path / "folder")), _logits(model))
    assert "tensormoe" not in (tmp_path / "folder" / "config.json").read_text()


def _fused() -> Any:
    return add_adapters(family("mixtral"), ["**.q_proj", "**.experts"], experts=3, rank=2)[0]


def _linear() -> Any:
    return add_adapters(gpt2(), "**.c_attn", experts=3, rank=2, scale=0.5, bias=True)[0]


def _factorized() -> Any:
    return add_adapters(compressed("mixtral"), rank=2)[0]


@pytest.mark.parametrize("make", [_fused, _linear, _factorized])
def test_folders(make: Any, tmp_path: Path) -> None:
    model = _moved(make())
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(_logits(again), _logits(model))
    assert _adapted(again) == _adapted(model) != []
    again.train()
    again(TOKENS, labels=TOKENS).loss.backward()
    trained = {name for name, each in again.named_parameters() if each.grad is not None}
    assert trained == {name for name, each in model.named_parameters() if each.requires_grad}
    assert torch.equal(_logits(copy.deepcopy(model)), _logits(model))


def _adapted(model: Any) -> list[tuple[str, str]]:
    kinds = AdaptedExperts, FactorizedExperts, ResidualExperts
    found = ((name, type(each)) for name, each in model.named_modules())
    return [(name, kind.__name__) for name, kind in found if kind in kinds]


def test_experts_of_a_folder_are_merged(tmp_path: Path) -> None:
    model = _moved(add_adapters(family("mixtral"), rank=2)[0])
    model.save_pretrained(tmp_path)
    again, plain = load(tmp_path), family("mixtral")
    merge_adapters(again)
    torch.testing.assert_close(_logits(again), _logits(model), rtol=1e-3, atol=1e-4)
    assert [*again.state_dict()] == [*plain.state_dict()]


def test_conv1d_is_merged_as_one() -> None:
    model, _ = add_adapters(gpt2(), "**.c_proj", experts=1, rank=2, bias=True)
    plain = gpt2()
    found = _logits(_moved(model))
    merge_adapters(model)
    torch.testing.assert_close(_logits(model), found, rtol=1e-4, atol=1e-5)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(_logits(plain), _logits(model))


def test_a_base_that_is_not_the_models_own_is_not_saved(tmp_path: Path) -> None:
    model, _ = add_adapters(gpt2(), "transformer.h.0.attn.c_attn", experts=2, rank=2)
    replace(model, "**.c_attn.base", experts=3)
    with pytest.raises(SpecError, match=r"c_attn.*base of an adapter must be the model's own"):
        model.save_pretrained(tmp_path)


def test_damaged_descriptions(tmp_path: Path) -> None:
    _moved(_fused()).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    for old, new in (
        ('"scale": 1.0', '"scale": 0.0'),
        ('"adapters": {', '"adapters": {"a": 1, '),
        ('"in_features": 16', '"in_features": 8'),
        ('"kind": "AdaptedExperts"', '"kind": "SparseMoE"'),
        ('"kind": "AdaptedExperts"', '"kind": "ResidualExperts"'),
    ):
        assert old in text
        config.write_text(text.replace(old, new))
        with pytest.raises((SpecError, ValueError)):
            load(tmp_path)


def test_experts_of_their_own_read_as_factorized_ones_are_the_same(tmp_path: Path) -> None:
    """Both have dense layers under adapters, and gate and up projection as one."""
    model = _moved(_fused()).eval()
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("AdaptedExperts", "FactorizedExperts"))
    found = load(tmp_path).eval()
    assert any(type(each).__name__ == "FactorizedExperts" for each in found.modules())
    with torch.no_grad():
        torch.testing.assert_close(found(TOKENS).logits, model(TOKENS).logits)


def test_gradient_checkpointing() -> None:
    model = _fused().train()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    ) if not hasattr(model, "activation_checkpointing_enable") else (
        model.activation_checkpointing_enable()
    )
    for each in (model, plain):
        each(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad)
