"""Descriptions of factorized layers in a model's configuration, and models without one."""

from __future__ import annotations

import copy
import pickle
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import BitsAndBytesConfig
from transformers.activations import ACT2FN

from tensormoe.errors import MissingDependencyError, SpecError
from tensormoe_torch import MuMoE, MuMoEEmbedding, MuMoEMLP, replace
from tensormoe_torch.compression import FactorizedExperts
from tensormoe_torch.huggingface import _requirements, attach
from tensormoe_torch.official import PreNormed
from tests._compress_models import logits
from tests._python import run_python
from tests.huggingface._models import compressed, gpt2, load


def modules(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = model.config.to_dict()["quantization_config"]["modules"]
    return found


def test_the_config_says_what_the_model_holds_now() -> None:
    model = gpt2()
    replace(model, "transformer.h.0.mlp", experts=4)
    assert set(modules(model)) == {"transformer.h.0.mlp"}
    model.transformer.h[1].mlp = MuMoEMLP(16, 64, experts=4)
    assert set(modules(model)) == {"transformer.h.0.mlp", "transformer.h.1.mlp"}
    # a copy's config is what it was when it was copied
    assert set(modules(copy.deepcopy(model))) == set(modules(model))


def test_layers_put_in_by_hand(tmp_path: Path) -> None:
    model = gpt2()
    model.transformer.h[0].mlp = MuMoEMLP(16, 64, experts=4, act_layer="gelu_tanh")
    model.transformer.wpe = Positions(16)
    attach(model)
    model.save_pretrained(tmp_path)
    assert set(modules(model)) == {"transformer.h.0.mlp", "transformer.wpe.table"}
    with pytest.raises(SpecError, match=r"transformer\.wpe\.table"):
        load(tmp_path)
    model = gpt2()
    model.transformer.h[0].mlp = MuMoEMLP(16, 64, experts=4, act_layer="gelu_tanh")
    attach(nn.ModuleDict({"inner": model}))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


class Positions(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = MuMoEEmbedding(32, size, experts=2, rank=2)


class Louder(MuMoE):
    def forward(self, *given: Any) -> Any:
        return 2 * super().forward(*given)


def loud() -> nn.Module:
    return Louder(16, 16, experts=4)


def normed() -> nn.Module:
    return PreNormed(MuMoE(16, 16, experts=4))


def odd() -> nn.Module:
    layers = {
        role: MuMoE(16, 16, experts=4, bias=False, gate=None) for role in ("up_proj", "down_proj")
    }
    return FactorizedExperts(layers, torch.sin)


@pytest.mark.parametrize("make", [loud, normed, odd])
def test_what_no_file_can_hold_is_not_saved(make: Any, tmp_path: Path) -> None:
    model = gpt2()
    model.transformer.h[0].mlp = make()
    attach(model)
    with pytest.raises(SpecError, match=r"at 'transformer\.h\.0\.mlp': .*state_dict"):
        model.save_pretrained(tmp_path)


def test_sharded_layers_are_what_they_were() -> None:
    model = gpt2()
    layer = MuMoE(16, 16, experts=4)
    layer.__class__ = type("FSDPMuMoE", (FSDPModule, MuMoE), {})
    model.transformer.h[0].mlp = layer
    attach(model)
    assert modules(model)["transformer.h.0.mlp"]["kind"] == "MuMoE"


@pytest.mark.parametrize("name", ["quick_gelu", "gelu_python", "relu2", "silu", "gelu_10"])
def test_activations_have_names(name: str, tmp_path: Path) -> None:
    model = compressed("olmoe")
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = ACT2FN[name]
    model.save_pretrained(tmp_path)
    assert modules(model)["model.layers.0.mlp.experts"]["act"] == name
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_blocks_with_activations_of_transformers(tmp_path: Path) -> None:
    model = gpt2()
    for layer in model.transformer.h:
        layer.mlp.act = ACT2FN["quick_gelu"]
    replace(model, "transformer.h.*.mlp", experts=4, drop=0.0)
    assert model.transformer.h[0].mlp.act is not None
    model.save_pretrained(tmp_path)
    assert modules(model)["transformer.h.0.mlp"]["act"] == "quick_gelu"
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_copies_pickles_and_casts(tmp_path: Path) -> None:
    compressed("mixtral").save_pretrained(tmp_path / "first")
    model = load(tmp_path / "first")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        other.save_pretrained(tmp_path / "other")
        assert torch.equal(logits(load(tmp_path / "other")), logits(model))
    # it is no quantized model to transformers, which would refuse these
    model.half().float()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    assert load(tmp_path / "narrow").dtype == torch.bfloat16


def test_models_that_are_quantized_as_well() -> None:
    model = gpt2()
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.warns(UserWarning, match="BitsAndBytesConfig.*state_dict"):
        replace(model, "transformer.h.0.mlp", experts=4)
    assert isinstance(model.config.quantization_config, BitsAndBytesConfig)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None])
def test_no_model_of_transformers(model: Any) -> None:
    with pytest.raises(SpecError, match="model must be"):
        attach(model)


@pytest.mark.parametrize("version", ["4.57.6", "5.12.1", "x", None])
def test_no_transformers_or_an_old_one(
    version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version is None:
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(_requirements, "version", lambda _: version)
    monkeypatch.delitem(sys.modules, "tensormoe_torch.huggingface")
    with pytest.raises(MissingDependencyError, match=r"pip install 'tensormoe\[huggingface\]'"):
        import_module("tensormoe_torch.huggingface")


def test_old_releases_do_not_hinder_surgery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensormoe_torch.huggingface")
    monkeypatch.setattr(_requirements, "_OLDEST", (99, 0))
    model = gpt2()
    with pytest.warns(UserWarning, match=r"can't save this model: .* transformers 99\.0"):
        replace(model, "transformer.h.0.mlp", experts=4)
    assert isinstance(model.transformer.h[0].mlp, MuMoEMLP)


def test_pytorch_layers_do_not_load_transformers() -> None:
    code = "import sys, tensormoe_torch; sys.exit('transformers' in sys.modules)"
    assert run_python("-c", code).returncode == 0
