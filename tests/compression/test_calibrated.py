"""Compressions of files weighted by a calibration, against sums over the rows of the data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

from tensormoe.cli import main
from tensormoe.compression import Calibration, Compression, compress_checkpoint, plan_compression
from tensormoe.errors import CheckpointError, SpecError
from tensormoe_torch import MuMoE
from tensormoe_torch.compression import calibrate, load_model, load_tokens, next_token_loss
from tensormoe_torch.compression._calibrate_checkpoint import calibrate_checkpoint
from tensormoe_torch.compression._text import TextWindows
from tests._calibrated import save_model, save_text

BERT = transformers.BertConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=16
)
WANTED = Compression("cp", rank=6, preset="mixtral", compare=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    save_model(folder / "model")
    save_text(folder / "text.txt")
    cut = TextWindows(6, 16)
    options: Any = {"windows": cut, "per_expert": True, "dtype": "float64", "fisher": True}
    found = calibrate_checkpoint(folder / "model", folder / "text.txt", **options)
    found.save(folder / "c.safetensors")
    return folder


def settings(folder: Path, **changes: Any) -> Compression:
    return replace(WANTED, calibration=str(folder / "c.safetensors"), **changes)


def rows_of(folder: Path) -> dict[str, list[tuple[int, Any, Any]]]:
    """Every row of every layer: expert, input and hidden units."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").double()
    model.set_experts_implementation("eager")
    text = torch.tensor([int(each[1:]) for each in (folder / "text.txt").read_text().split()])
    windows = text[: len(text) // 16 * 16].reshape(-1, 16)
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:6]
    found: dict[str, list[tuple[int, Any, Any]]] = {}
    for name, module in model.named_modules():
        if name.endswith("experts"):

            def hook(module: Any, args: Any, name: str = name) -> None:
                x, index, _ = args
                for token in range(len(x)):
                    for n in index[token].tolist():
                        gate, up = (module.gate_up_proj[n] @ x[token]).chunk(2)
                        hidden = F.silu(gate) * up
                        row = (n, x[token].detach().numpy(), hidden.detach().numpy())
                        found.setdefault(name, []).append(row)

            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(windows[drawn])
    return found


def matrices(folder: Path, output: Path, report: Any) -> tuple[Any, Any]:
    """Experts as they were and as they are, (experts, in, out)."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model" / "model.safetensors")
    names = [report.name.replace("*", str(n)) for n in range(4)]
    before = np.stack([tensors[name].T for name in names]).astype("float64")
    layer = MuMoE.load(output / report.file)
    return before, layer.materialize()[0].detach().double().numpy()


def test_the_error_of_outputs_is_that_of_every_row(folder: Path, tmp_path: Path) -> None:
    result = compress_checkpoint(folder / "model", tmp_path / "out", settings(folder))
    rows = rows_of(folder)
    for report in result.groups:
        before, after = matrices(folder, tmp_path / "out", report)
        layer = rows[f"model.layers.{report.name.split('.')[2]}.mlp.experts"]
        missing = whole = 0.0
        for n, x, hidden in layer:
            given = hidden if ".w2." in report.name else x
            missing += float(
                ((before[n] - after[n]).T @ given) @ ((before[n] - after[n]).T @ given)
            )
            whole += float((before[n].T @ given) @ (before[n].T @ given))
        # the model on disk ran in float32 when it was calibrated
        assert report.output_error == pytest.approx((missing / whole) ** 0.5, rel=1e-5)


def test_outputs_lose_less_and_weights_more(folder: Path, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    two = tuple(f"layers.0.block_sparse_moe.experts.*.{name}" for name in ("w1", "w2"))
    plain = replace(WANTED, preset=None, experts=two)
    for weighting in ("none", "inputs", "both", "fisher"):
        experts = "equal" if weighting == "none" else "frequency"
        changes = {"preset": None, "experts": two, "expert_weights": experts}
        wanted = settings(folder, weighting=weighting, **changes)
        found[weighting] = compress_checkpoint(
            folder / "model", tmp_path / weighting, wanted
        ).groups
    for before, weighted in zip(found["none"], found["inputs"], strict=True):
        assert weighted.output_error < before.output_error
        assert weighted.error > before.error
    unweighted = compress_checkpoint(folder / "model", tmp_path / "without", plain).groups
    assert [e.error for e in unweighted] == [e.error for e in found["none"]]
    assert all(e.output_error is None for e in unweighted)
    for other in ("both", "fisher"):
        assert [e.error for e in found[other]] != [e.error for e in found["inputs"]]


def test_stacks_of_gate_and_up_are_calibrated_too(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "granitemoe")
    save_text(tmp_path / "text.txt")
    found = calibrate_checkpoint(model, tmp_path / "text.txt", windows=TextWindows(6, 16))
    found.save(tmp_path / "c.safetensors")
    wanted = replace(
        WANTED, preset="fused", calibration=str(tmp_path / "c.safetensors"), weighting="both"
    )
    result = compress_checkpoint(model, tmp_path / "out", wanted)
    assert [each.out_features for each in result.groups] == [48, 16, 48, 16]
    plain = compress_checkpoint(model, tmp_path / "plain", replace(wanted, weighting="none"))
    inputs = compress_checkpoint(model, tmp_path / "inputs", replace(wanted, weighting="inputs"))
    both: Any = zip(plain.groups, inputs.groups, strict=True)
    for a, b in both:
        assert b.output_error < a.output_error


def test_a_command_shows_both_errors(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", str(folder / "model"), "--preset", "mixtral", "--budget", "30%"]
    words += ["--factorization", "cp", "--calibration", str(folder / "c.safetensors")]
    words += ["--weighting", "both", "--expert-weights", "router"]
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "192" in shown
    assert "inputs and outputs, experts by router weights" in shown
    assert main([*words, "--dry-run", "--json"]) == 0
    assert [each["rows"] for each in json.loads(capsys.readouterr().out)["groups"]] == [192] * 6
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    assert "outputs" in capsys.readouterr().out
    assert main([*words, "--output", str(tmp_path / "out"), "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert all(0 < each["output_error"] < 1 for each in groups)
    # another calibration under the same name is another command
    found = Calibration.load(folder / "c.safetensors")
    again = tmp_path / "again.safetensors"
    replace(found, arrays=dict(found.arrays)).save(again)
    changed = [str(again) if "c.safetensors" in word else word for word in words]
    assert main([*changed, "--output", str(tmp_path / "out")]) == 2
    assert "calibration" in capsys.readouterr().err


def test_a_calibration_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    found = Calibration.load(folder / "c.safetensors")
    wanted = settings(folder)
    # a model of the same sizes whose configuration differs
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"those of gate_proj in .*layers\.0.* differ"):
        compress_checkpoint(other, tmp_path / "out", wanted)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match="its configuration differ"):
        plan_compression(other, wanted)
    words = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps({**words, "truncation": None, "x": 1}))
    with pytest.raises(CheckpointError, match="configuration and its tokenizer differ"):
        plan_compression(other, wanted)
    wide = save_model(tmp_path / "olmoe", "olmoe")
    with pytest.raises(CheckpointError, match="names and shapes of tensors"):
        plan_compression(wide, replace(wanted, preset="olmoe"))
    less = {k: a for k, a in found.arrays.items() if "outputs" not in k and "gradients" not in k}
    replace(found, arrays=less).save(tmp_path / "less.safetensors")
    few = replace(wanted, calibration=str(tmp_path / "less.safetensors"))
    for weighting in ("both", "fisher"):
        with pytest.raises(SpecError, match="needs second moments of"):
            plan_compression(folder / "model", replace(few, weighting=weighting))
    one = {name: count for name, count in found.tokens.items() if ".1." in name}
    replace(found, tokens=one).save(tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"must have the layer 'model\.layers\.0"):
        plan_compression(
            folder / "model", replace(wanted, calibration=str(tmp_path / "one.safetensors"))
        )
    with pytest.raises(SpecError, match="need a calibration; got none"):
        replace(WANTED, weighting="both")
    with pytest.raises(SpecError, match="weighting must be one of"):
        settings(folder, weighting="all")


def test_per_expert_and_pooled_moments_meet_where_experts_get_the_same() -> None:
    """A router that gives every expert every token."""
    from tests._torch_moe import sparse

    model = sparse("mixtral")
    model.config.num_experts_per_tok = 4
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 4
    tokens = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    options: Any = {"dtype": "float64", "loss": next_token_loss}
    pooled = calibrate(model, tokens, **options)
    exact = calibrate(model, tokens, per_expert=True, **options)
    rng = np.random.default_rng(0)
    for layer in pooled.layers:
        pairs = [(rng.standard_normal((16, 24)), rng.standard_normal((16, 24))) for _ in range(4)]
        found = [each.output_error(layer, "up_proj", pairs) for each in (pooled, exact)]
        assert found[0] == pytest.approx(found[1], rel=1e-9)
        pairs = [(rng.standard_normal((24, 16)), rng.standard_normal((24, 16))) for _ in range(4)]
        found = [each.output_error(layer, "down_proj", pairs) for each in (pooled, exact)]
        assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_batches_of_a_text(folder: Path) -> None:
    model = load_model(folder / "model")
    assert not model.training
    ids = load_tokens(folder / "text.txt", folder / "model", (model,))
    found = TextWindows(9, 16, batch=4).of(ids, model)
    assert [tuple(each.shape) for each in found] == [(4, 16), (4, 16), (1, 16)]
    assert torch.equal(torch.cat(found), torch.cat(TextWindows(9, 16).of(ids, model)))
    with pytest.raises(SpecError, match="batch must be a positive integer; got 0"):
        TextWindows(batch=0)


def test_models_of_the_class_that_they_name(folder: Path, tmp_path: Path) -> None:
    transformers.BertForMaskedLM(BERT).save_pretrained(tmp_path)
    assert type(load_model(tmp_path)).__name__ == "BertForMaskedLM"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert type(load_model(tmp_path)).__name__ == "BertLMHeadModel"
