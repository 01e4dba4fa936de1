"""Folders of compressed models: their contents, and loaders that open them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tensormoe.checkpoint import peek_checkpoint
from tensormoe.compression import Compression, compress_checkpoint
from tensormoe.errors import SpecError
from tensormoe_torch import MuMoE
from tensormoe_torch.compression import FactorizedExperts
from tests._compress_models import family, save_family
from tests._python import run_python
from tests.huggingface._models import load


def compress(model: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Run ``tensormoe compress``; return the manifest."""
    wanted = {"preset": "mixtral", **options}
    compress_checkpoint(model, output, Compression("cp", rank=2, compare=False, **wanted))
    manifest: dict[str, Any] = json.loads((output / "tensormoe.json").read_text())
    return manifest


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mixtral"
    save_family("mixtral", folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mixtral\n\nIts own words.\n")
    return folder


@pytest.fixture(scope="module")
def factors(mixtral: Path) -> Path:
    output = mixtral.parent / "factors"
    compress(mixtral, output)
    return output


def test_the_index_has_every_tensor_once(factors: Path) -> None:
    index = json.loads((factors / "model.safetensors.index.json").read_text())
    found: dict[str, str] = {}
    size = 0
    for path in factors.rglob("*.safetensors"):
        for key, array in load_file(path).items():
            assert key not in found
            found[key] = path.relative_to(factors).as_posix()
            size += array.nbytes
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == size


def test_files_of_factors_are_layers_as_well(factors: Path) -> None:
    manifest = json.loads((factors / "tensormoe.json").read_text())
    model = load(factors)
    for group in manifest["groups"]:
        layer = MuMoE.load(factors / group["file"])
        header = peek_checkpoint(factors / group["file"])
        module, _, role = header.prefix.removesuffix(".").rpartition(".projections.")
        experts = model.get_submodule(module.replace("block_sparse_moe", "mlp"))
        assert isinstance(experts, FactorizedExperts)
        theirs = experts.projections[role].state_dict()
        assert {name: header.arrays[name].shape for name in theirs} == {
            name: tuple(each.shape) for name, each in theirs.items()
        }
        assert all(torch.equal(each, theirs[name]) for name, each in layer.state_dict().items())


def test_the_readme_says_what_to_import(factors: Path) -> None:
    text = (factors / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\n---\n\n# mixtral, experts in factors\n")
    assert "import tensormoe_torch.huggingface" in text
    assert 'AutoModelForCausalLM.from_pretrained("this folder")' in text
    assert text.endswith("# Mixtral\n\nIts own words.\n")


def test_without_the_import_transformers_warns(factors: Path) -> None:
    code = "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    run = run_python("-c", code, factors)
    assert "Unknown quantization type, got tensormoe" in run.stderr
    assert "config.json" in run.stderr
    config = json.loads((factors / "config.json").read_text())
    assert config["quantization_config"]["import"] == "tensormoe_torch.huggingface"


def test_some_experts_make_no_whole_model(mixtral: Path, tmp_path: Path) -> None:
    pattern = "layers.1.block_sparse_moe.experts.*.w1"
    manifest = compress(mixtral, tmp_path / "out", preset=None, experts=(pattern,))
    assert not (tmp_path / "out" / "config.json").exists()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "only gate_proj are in factors" in text
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert MuMoE.load(tmp_path / "out" / manifest["groups"][0]["file"]).spec.experts == (4,)


def test_one_layer_of_several(mixtral: Path, tmp_path: Path) -> None:
    patterns = tuple(f"layers.1.block_sparse_moe.experts.*.{each}" for each in ("w1", "w2", "w3"))
    compress(mixtral, tmp_path / "out", preset=None, experts=patterns)
    model = load(tmp_path / "out")
    kinds = [type(layer.mlp.experts).__name__ for layer in model.model.layers]
    assert kinds == ["MixtralExperts", "FactorizedExperts"]


def test_a_model_in_one_file(tmp_path: Path) -> None:
    family("mixtral").save_pretrained(tmp_path / "model")
    compress(tmp_path / "model", tmp_path / "out")
    # a loader would take this name for all there is
    assert not (tmp_path / "out" / "model.safetensors").exists()
    load(tmp_path / "out")
    # and a file on its own has no config
    compress(tmp_path / "model" / "model.safetensors", tmp_path / "bare")
    assert "file on its own" in (tmp_path / "bare" / "README.md").read_text()
    assert not (tmp_path / "bare" / "config.json").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"quantization_config": {"quant_method": "gptq"}}', "quantized as well"),
        ("{", "can be read"),
        (None, "no checkpoint|none at|can be read"),
    ],
)
def test_models_that_no_loader_could_open(
    text: str | None, reason: str, mixtral: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(mixtral, model)
    (model / "config.json").unlink()
    if text is not None:
        (model / "config.json").write_text(text)
    compress(model, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    found = (tmp_path / "out" / "README.md").read_text()
    assert "No loader of models can open this folder" in found
    assert any(each in found for each in reason.split("|"))


def test_experts_that_are_called_in_another_way(factors: Path, tmp_path: Path) -> None:
    # as those of Llama 4, which take all tokens of each expert at once
    out = tmp_path / "out"
    shutil.copytree(factors, out)
    config = json.loads((out / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    modules["model.layers.0.mlp"] = modules.pop("model.layers.0.block_sparse_moe.experts")
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError, match="tokens, indices and weights"):
        AutoModelForCausalLM.from_pretrained(out)
