"""Damaged and hostile descriptions of layers, refused before weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tensormoe.errors import CheckpointError, SpecError
from tensormoe_torch import reduce_experts
from tensormoe_torch.huggingface import TensormoeConfig
from tests._compress_models import family
from tests.huggingface._models import compressed, load

EXPERTS = "model.layers.0.mlp.experts"
HERE = ("modules", EXPERTS)
SPEC = (*HERE, "projections", "down_proj", "spec")

Change = Callable[[dict[str, Any]], object]


def put(*path: Any) -> Change:
    """Set what is at a path."""
    *keys, last, value = path

    def change(config: dict[str, Any]) -> None:
        found: Any = config
        for key in keys:
            found = found[key]
        found[last] = value

    return change


def move(name: str) -> Change:
    return lambda config: config["modules"].update({name: config["modules"].pop(EXPERTS)})


DAMAGES: dict[str, tuple[Change, str]] = {
    "another version": (put("version", 3), "version"),
    "no version": (put("version", True), "version"),
    "an unknown key": (put("more", 1), "exactly"),
    "no modules": (lambda config: config.pop("modules"), "exactly"),
    "a list": (put("modules", [1]), "mapping"),
    "an unknown kind": (put(*HERE, "kind", "os.system"), "kind"),
    "no kind": (put(*HERE, "kind", [1]), "kind"),
    "no layer": (put(*HERE, None), "kind"),
    "not merged": (put(*HERE, "merged", False), "exactly"),
    "merged without groups": (put(*HERE, "merged", True), "groups' and 0 more are missing"),
    "more of a layer": (put(*HERE, "code", "1"), "exactly"),
    "an unknown activation": (put(*HERE, "act", "eval"), "activation"),
    "no activation": (put(*HERE, "act", ["gelu"]), "activation"),
    "no projections": (put(*HERE, "projections", {}), "projections"),
    "unknown biases": (put(*HERE, "biases", ["x"]), "biases"),
    "biases of others": (put(*HERE, "biases", ["gate_up_proj"]), "biases"),
    "no spec": (put(*SPEC, None), "layer spec"),
    "more experts": (put(*SPEC, "experts", [5]), "4 experts"),
    "many levels": (put(*SPEC, "experts", [2] * 50), "at most 32 levels; got 50"),
    "another size": (put(*SPEC, "in_features", 7), "fit"),
    "a huge rank": (put(*SPEC, "rank", 10**9), "entries"),
    "a huge size": (put(*SPEC, "experts", [10**15]), "entries"),
    "no module of the model": (move("model.layers.7.mlp.experts"), "must have the layer"),
    "no experts": (move("model.layers.0.self_attn"), "experts"),
    "the model itself": (move(""), "name"),
    "a module in another": (put("modules", f"{EXPERTS}.x", {"kind": "MuMoE", "config": {}}), "lie"),
    "a layer that is left out": (lambda config: config["modules"].pop(EXPERTS), "factors"),
    "no layers": (put("modules", {}), "factors"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    compressed("mixtral").save_pretrained(path)
    return path


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_descriptions(damage: str, folder: Path) -> None:
    path = folder / "config.json"
    text = path.read_text()
    config = json.loads(text)
    change, message = DAMAGES[damage]
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    try:
        with pytest.raises((SpecError, CheckpointError), match=message):
            AutoModelForCausalLM.from_pretrained(folder)
    finally:
        path.write_text(text)


def test_merged_experts(tmp_path: Path) -> None:
    model = family("mixtral")
    reduce_experts(model, torch.arange(24).reshape(2, 12), keep=3)
    model.save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    arrays, text = load_file(file), config.read_text()
    # under the name that the family has on disk
    name = next(each for each in arrays if each.endswith(".groups"))
    for value in (-1, 3):
        wrong = arrays[name].clone()
        wrong[1] = value
        save_file(arrays | {name: wrong}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match="must hold numbers of experts, 0 to 2; the file"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file(arrays, file, {"format": "pt"})
    for count, message in ((5, "at most the 4 of the model; got 5"), (2, "must fit one another")):
        found = json.loads(text)
        for layer in found["quantization_config"]["modules"][EXPERTS]["projections"].values():
            layer["spec"]["experts"] = [count]
            if count == 2 and layer["spec"]["in_features"] == 24:
                layer["spec"]["experts"] = [3]
        config.write_text(json.dumps(found))
        with pytest.raises((SpecError, CheckpointError), match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    found = json.loads(text)
    del found["quantization_config"]["modules"][EXPERTS]["merged"]
    config.write_text(json.dumps(found))
    with pytest.raises(SpecError, match="the 4 experts of the model"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_and_misshapen_factors(tmp_path: Path) -> None:
    compressed("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    arrays = load_file(path)
    name = next(key for key in arrays if "factors" in key)
    save_file({k: v for k, v in arrays.items() if k != name}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="18 factors; the files of the model hold 17"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    # of the same number: only after loading can it be seen
    save_file({f"{k}0" if k == name else k: v for k, v in arrays.items()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"0 more are missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    wide = torch.cat([arrays[name], arrays[name]])
    save_file({**arrays, name: wide}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"other shapes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    save_file(arrays, path, {"format": "pt"})
    load(tmp_path)


def test_dense_models_are_not_factorized_while_they_are_loaded(tmp_path: Path) -> None:
    family("mixtral").save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"tensormoe_torch\.compress"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TensormoeConfig({}))
