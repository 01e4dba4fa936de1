"""The way of gate and up projection that loses less, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import tensormoe_torch.huggingface  # noqa: F401
from tensormoe.cli import main
from tensormoe.compression import (
    GATE_UP,
    Compression,
    CompressionProgress,
    compress_checkpoint,
    plan_compression,
)
from tensormoe.compression._settle import losses
from tensormoe.errors import CheckpointError, SpecError
from tensormoe.selection import allocate
from tests._compress_models import (
    COMMON,
    LATENT,
    content,
    logits,
    opened,
    save,
    save_shards,
)
from tests._more_models import BOTH, MORE, TWO, experts_of, low_rank, roles

QUICK = {"compare": False}


def alike(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Two layers: of one, gate and up projections have the inputs they use in common."""
    found: dict[str, torch.Tensor] = {}
    for layer, shared in enumerate((True, False)):
        stem = f"model.layers.{layer}.block_sparse_moe.experts"
        for number in range(4):
            left = rng.standard_normal((2, 12, 3))
            for place, key in enumerate(("w1", "w3")):
                own = left[0 if shared else place]
                matrix = own @ rng.standard_normal((3, 10))
                found[f"{stem}.{number}.{key}.weight"] = tensor(matrix.T)
            found[f"{stem}.{number}.w2.weight"] = tensor(rng.standard_normal((12, 10)))
    return found


def tensor(array: Any) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32)


# as one, both have the rank 3 that they need where they share inputs, 3 · (12 + 20) of 240 entries;
# as two, they have rank 2 each, and so 4 where they share none
AUTO = Compression("low_rank", budget=0.42, preset="mixtral", gate_up="auto", **QUICK)


@pytest.fixture
def mixed(tmp_path: Path, rng: np.random.Generator) -> Path:
    return save_shards(tmp_path / "model", alike(rng))


def ways(names: Mapping[str, Any] | list[str]) -> list[str]:
    return [name.split("experts.")[1].removeprefix("*.") for name in names if "w2" not in name]


def test_each_layer_gets_the_way_that_loses_less(mixed: Path, tmp_path: Path) -> None:
    plan = plan_compression(mixed, AUTO)
    assert [each.instead for each in plan.others] == [
        (plan.groups[0].group.name, plan.groups[2].group.name),
        (plan.groups[3].group.name, plan.groups[5].group.name),
    ]
    # of those that are tried, one way alone counts
    assert plan.dense_entries == 2 * 4 * (240 + 120)
    assert plan.factor_bytes <= 0.42 * plan.dense_bytes
    assert plan.parameters == 2 * 4 * (3 * (12 + 20) + 2 * (12 + 10))
    result = compress_checkpoint(mixed, tmp_path / "out", AUTO)
    names = [report.name for report in result.groups]
    assert ways(names) == ["w1+w3.weight", "w1.weight", "w3.weight"]
    assert result.groups[0].error < 1e-3 < min(each.error for each in result.groups[1:])
    assert {each.name for each in (tmp_path / "out" / "experts").iterdir()} == {
        Path(report.file or "").name for report in result.groups
    }
    assert all(report.energy is None for report in result.groups)
    manifest = json.loads((tmp_path / "out" / "tensormoe.json").read_text())
    assert [each["name"] for each in manifest["groups"]] == names
    assert manifest["command"]["gate_up"] == "auto"
    assert not any("energy" in each for each in manifest["groups"])
    assert result.nbytes <= plan.factor_bytes
    # each way by itself is what it is as the only one
    for way, layer in (("joined", "layers.0"), ("apart", "layers.1")):
        alone = compress_checkpoint(mixed, tmp_path / way, replace(AUTO, gate_up=way))
        for report in (each for each in result.groups if layer in each.name):
            (same,) = [each for each in alone.groups if each.name == report.name]
            assert replace(same, seconds=None) == replace(report, seconds=None)
    # entries in all, shared out by size, and rebuilt
    counted = replace(AUTO, budget=int(0.42 * plan.dense_entries), dense=True)
    again = compress_checkpoint(mixed, tmp_path / "dense", counted)
    assert [report.name for report in again.groups] == names
    assert not (tmp_path / "dense" / "experts").exists()
    # the same command shows the same
    assert compress_checkpoint(mixed, tmp_path / "out", AUTO).groups == tuple(
        replace(each, seconds=None) for each in result.groups
    )


def test_losses_are_in_one_unit(mixed: Path, tmp_path: Path) -> None:
    result = compress_checkpoint(mixed, tmp_path / "out", replace(AUTO, gate_up="apart"))
    report, *_ = result.groups

    def given(error: float, energy: float, **more: Any) -> Any:
        return replace(report, error=error, energy=energy, **more)

    # of a small projection much may be lost
    one, two = given(0.5, 1.0), given(0.1, 100.0)
    assert losses([one, two]) == pytest.approx(0.25 + 1.0)
    assert losses([given(0.9, 2.0, output_error=0.5)]) == pytest.approx(0.5)
    assert losses([given(0.9, 2.0, output_error=0.5, predicted_loss=0.1)] * 2) == 0.2
    assert json.loads(json.dumps(one.to_dict()))["energy"] == 1.0
    assert type(report).from_dict(one.to_dict()) == one


@pytest.mark.parametrize("stop", range(1, 9, 2))
def test_interrupted_it_goes_on_to_the_same_bytes(stop: int, mixed: Path, tmp_path: Path) -> None:
    compress_checkpoint(mixed, tmp_path / "whole", AUTO)
    seen: list[str] = []

    def interrupt(now: CompressionProgress) -> None:
        if now.stage == "experts" and now.search is None and now.name:
            seen.append(now.name)
            if len(seen) > stop:
                raise KeyboardInterrupt

    if stop < 8:
        with pytest.raises(KeyboardInterrupt, match="of 8 groups are done"):
            compress_checkpoint(mixed, tmp_path / "out", AUTO, callback=interrupt)
    compress_checkpoint(mixed, tmp_path / "out", AUTO)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    with pytest.raises(CheckpointError, match="gate_up was 'auto' and is 'joined'"):
        compress_checkpoint(mixed, tmp_path / "out", replace(AUTO, gate_up="joined"))


def test_as_stored_nothing_changes(mixed: Path, tmp_path: Path) -> None:
    stored = replace(AUTO, gate_up="stored")
    assert "gate_up" not in stored.to_dict()
    apart = replace(AUTO, gate_up="apart")
    assert [each.group for each in plan_compression(mixed, stored).groups] == [
        each.group for each in plan_compression(mixed, apart).groups
    ]
    one, two = (
        compress_checkpoint(mixed, tmp_path / wanted.gate_up, wanted) for wanted in (stored, apart)
    )
    strip = [[replace(each, seconds=None) for each in found.groups] for found in (one, two)]
    assert strip[0] == strip[1]
    assert GATE_UP[0] == Compression("cp", rank=1).gate_up == "stored"


def test_few_bits_and_several_factorizations(mixed: Path, tmp_path: Path) -> None:
    rounded = replace(AUTO, bits=8, budget=0.4)
    result = compress_checkpoint(mixed, tmp_path / "rounded", rounded)
    assert result.nbytes <= 0.4 * result.dense_bytes
    assert {report.bits for report in result.groups} == {8}
    several = replace(AUTO, factorization=("low_rank", "shared_basis"))
    found = compress_checkpoint(mixed, tmp_path / "several", several)
    assert ways([each.name for each in found.groups])[0] == "w1+w3.weight"
    whole = Compression("dense", bits=4, preset="mixtral", gate_up="joined", **QUICK)
    assert len(compress_checkpoint(mixed, tmp_path / "int4", whole).groups) == 4
    close = replace(AUTO, budget=None, tolerance=0.6, gate_up="joined")
    assert all(e.error <= 0.61 for e in compress_checkpoint(mixed, tmp_path / "t", close).groups)


def refused(kind: type[Exception], match: str, model: Path, **options: Any) -> None:
    with pytest.raises(kind, match=match):
        compress_checkpoint(
            model, model.with_name("refused"), Compression("cp", **{"budget": 0.5, **options})
        )
    assert not model.with_name("refused").exists()


def test_what_cannot_be_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = alike(rng)
    model = save(tmp_path / "m.safetensors", tensors)
    with pytest.raises(SpecError, match=r"gate_up must be one of 'stored', 'joined'.*got 'one'"):
        Compression("cp", rank=1, gate_up="one")
    for size in ({"rank": 2}, {"tolerance": 0.1}):
        with pytest.raises(SpecError, match=r"gate_up='auto' .* needs a budget; got none"):
            Compression("cp", gate_up="auto", **size)
    lone = ("layers.*.experts.*.w1", "layers.*.experts.*.w2")
    for way in ("joined", "apart", "auto"):
        refused(CheckpointError, "w1.weight' and no up_proj", model, experts=lone, gate_up=way)
        down = lone[1:]
        refused(CheckpointError, "needs experts with a gate", model, experts=down, gate_up=way)
    both = ("layers.*.experts.*.w1", "layers.*.experts.*.w3")
    for changed in (torch.zeros(9, 12), torch.zeros(10, 12, dtype=torch.bfloat16)):
        other = {
            key: changed if ".0." in key.replace("layers.0", "") and "w3" in key else each
            for key, each in tensors.items()
        }
        other = {k: changed.clone() if "w3" in k else each for k, each in other.items()}
        uneven = save(tmp_path / "uneven.safetensors", other)
        refused(
            CheckpointError,
            "same sizes and dtype to be joined",
            uneven,
            experts=both,
            gate_up="joined",
        )
    nameless = {key.replace("w1", "a").replace("w3", "b"): each for key, each in tensors.items()}
    unknown = save(tmp_path / "unknown.safetensors", nameless)
    names = ("layers.*.experts.*.a", "layers.*.experts.*.b")
    refused(CheckpointError, "does not tell which", unknown, experts=names, gate_up="joined")
    odd = {"layers.0.mlp.experts.gate_up_proj": torch.ones(2, 4, 5)}
    odd = {**odd, "layers.0.mlp.experts.down_proj": torch.ones(2, 3, 4)}
    stack = save(tmp_path / "odd.safetensors", odd)
    refused(
        CheckpointError,
        "even number of outputs; got 5",
        stack,
        gate_up="apart",
        layout="in_out",
        experts=("experts.gate_up_proj", "experts.down_proj"),
    )
    biased = {
        "layers.0.mlp.experts.gate_up_proj": torch.ones(2, 4, 6),
        "layers.0.mlp.experts.gate_up_proj_bias": torch.ones(2, 6),
        "layers.0.mlp.experts.down_proj": torch.ones(2, 3, 4),
    }
    stack = save(tmp_path / "biased.safetensors", biased)
    refused(SpecError, "where their biases are.*_bias'", stack, gate_up="apart", preset="fused")


def test_experts_without_a_gate(tmp_path: Path) -> None:
    assert "nemotron_h" in MORE
    low_rank("nemotron_h").save_pretrained(tmp_path / "model")
    for way in ("joined", "apart", "auto"):
        refused(CheckpointError, "no gate_proj.*without a gate", tmp_path / "model", gate_up=way)


def test_gpt_oss_stays_as_it_is_unless_matrices_are_written(tmp_path: Path) -> None:
    low_rank("gpt_oss").save_pretrained(tmp_path / "model")
    for way in ("apart", "auto"):
        refused(SpecError, "take both projections as one layer", tmp_path / "model", gate_up=way)
    wanted = Compression("low_rank", budget=0.5, gate_up="auto", dense=True, **QUICK)
    result = compress_checkpoint(tmp_path / "model", tmp_path / "dense", wanted)
    model = opened(tmp_path / "dense")
    before = low_rank("gpt_oss")
    for layer, old in zip(experts_of(model), experts_of(before), strict=True):
        for key in ("gate_up_proj_bias", "down_proj_bias"):
            assert torch.equal(layer.get_parameter(key), old.get_parameter(key))
    assert len(result.groups) in (4, 5, 6)


def test_allocations_have_one_way(tmp_path: Path) -> None:
    model = low_rank("granitemoe")
    model.save_pretrained(tmp_path / "model")
    found = allocate(model, 0.5, factorization="cp", what="experts")
    wanted = Compression("cp", allocation=found, gate_up="apart", **QUICK)
    result = compress_checkpoint(tmp_path / "model", tmp_path / "out", wanted)
    assert len(result.groups) == 6
    assert roles(opened(tmp_path / "out")) == {TWO}
    for way in ("joined", "stored"):
        with pytest.raises(SpecError, match=r"apart: give gate_up='apart' \(--gate-up apart\)"):
            plan_compression(tmp_path / "model", replace(wanted, gate_up=way))
    with pytest.raises(SpecError, match="needs a budget"):
        replace(wanted, gate_up="auto")


def test_the_command_line(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compress", str(mixed), "--factorization", "low_rank", "--budget", "42%"]
    words += ["--preset", "mixtral", "--gate-up", "auto"]
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "as one tensor or as two, in each of 2 layers what loses less" in shown
    assert main([*words, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [len(each.get("instead", ())) for each in plan["groups"]] == [0] * 6 + [2] * 2
    assert main([*words, "--json", "--output", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["gate_up"] == "auto"
    assert ways([each["name"] for each in found["groups"]])[0] == "w1+w3.weight"
    assert main([*words[:-1], "both", "--dry-run"]) == 2
    assert "gate_up must be one of" in capsys.readouterr().err


def test_gates_of_their_own_in_files_of_two_are_joined(tmp_path: Path) -> None:
    torch.manual_seed(0)
    more = {"num_experts": 4, "num_local_experts": 4, "head_dim": 8, "swiglu_limit": 0.1}
    config = transformers.AutoConfig.for_model("deepseek_v4", **{**COMMON, **LATENT, **more})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    names = tuple(f"layers.*.ffn.experts.*.w{number}" for number in (1, 3, 2))
    wanted = Compression("low_rank", budget=0.5, experts=names, gate_up="joined", **QUICK)
    compress_checkpoint(tmp_path / "model", tmp_path / "factors", wanted)
    compress_checkpoint(tmp_path / "model", tmp_path / "dense", replace(wanted, dense=True))
    found = opened(tmp_path / "factors")
    assert roles(found) == {BOTH}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(logits(found), logits(plain), atol=2e-4, rtol=1e-3)
    # the clamp is reached
    for each in plain.modules():
        if hasattr(each, "_apply_gate"):
            each.limit = 100.0
    assert (logits(found) - logits(plain)).abs().max() > 1e-3
    apart = replace(wanted, gate_up="apart")
    compress_checkpoint(tmp_path / "model", tmp_path / "apart", apart)
    with pytest.raises(SpecError, match=r"gate and up projection as one layer.*--gate-up joined"):
        opened(tmp_path / "apart")
