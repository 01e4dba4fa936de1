"""Blocks, gated blocks and embeddings; training, dtypes and devices: as the library says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tensormoe import CP, Gate, LayerSpec, select_rank
from tensormoe._config import LayerConfig
from tensormoe._resolve import Options
from tensormoe.cli import main
from tensormoe.planning import PUBLISHED_ROOFLINES, Routing, plan_layer
from tensormoe.selection import select_block
from tests._command import ask, check_not_blank

SIZES = ("96", "64", "16")
BLOCKS = {"mlp": ("gelu", False), "gated": ("silu", True)}


def block(kind: str, **options: Any) -> Any:
    act, gated = BLOCKS[kind]
    return Options(16, **options).block(96, 48, 64, act, gated=gated)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_costs_what_the_library_says(
    capsys: pytest.CaptureFixture[str], kind: str, training: bool
) -> None:
    words = ("--kind", kind, "--hidden", "48", "--batch", "32", "--dtype", "float64")
    words += ("--training",) if training else ()
    found = ask(capsys, "plan", *SIZES, *words, "--rank", "8", "--device", "cpu")
    config = block(kind, factorization="cp", rank=8)
    cost = config.cost(32, training=training, itemsize=8)
    assert found["flops"] == cost.flops
    assert found["memory"] == cost.peak_memory
    assert found["parameters"] == config.num_parameters
    assert [each["name"] for each in found["layers"]] == ["first", "second"]
    specs = [LayerSpec.from_dict(each["spec"]) for each in found["layers"]]
    assert specs == [config.first.spec, config.second.spec]
    assert main(["plan", *SIZES, *words, "--rank", "8", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "the first layer" in text
    assert "the second layer" in text
    assert f"{cost.flops:,}" in text.split("the block")[1]


@pytest.mark.parametrize("kind", BLOCKS)
def test_rank_of_a_block_is_what_the_library_selects(
    capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    words = ("--kind", kind, "--hidden", "48", "--budget", "30k", "--factorization", "cp,tucker")
    found = ask(capsys, "rank", *SIZES, *words)
    assert found["request"]["budget"] == {"parameters": 30_000}
    for row in found["rows"]:
        both = select_block(row["name"], 96, 48, 64, 16, budget=30_000, gated=kind == "gated")
        ranks = [each.factorization.rank for each in both]
        assert row["ranks"] == [[*each] if isinstance(each, tuple) else each for each in ranks]
        assert row["parameters"] <= 30_000
        assert row["expert_rank"] == min(each.expert_rank for each in both)
    names = [row["name"] for row in found["baselines"]]
    assert {"dense MoE", "sparse MoE", "soft MoE", "Cartesian MoE", "product keys"} < {*names}
    plan = ask(capsys, "plan", *SIZES, *words[:-1], "cp")
    assert plan["parameters"] == found["rows"][0]["parameters"]


def test_the_default_budget_of_a_block_is_the_block_that_is_replaced(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = ask(capsys, "rank", *SIZES, "--kind", "mlp", "--factorization", "cp")
    wanted = 97 * 384 + 385 * 64
    assert found["request"]["budget"] == {"parameters": wanted}
    assert found["request"]["hidden_features"] == 384
    assert found["rows"][0]["parameters"] <= wanted + 96 * 16


def test_embeddings_have_ids_and_neither_bias_nor_gate(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("500", "64", "16", "--kind", "embedding", "--factorization", "cp")
    (row,) = ask(capsys, "rank", *words)["rows"]
    rank = select_rank("cp", 500, 64, 16, bias=False, gate=None, indexed_input=True)
    assert row["rank"] == rank
    found = ask(capsys, "plan", *words)
    spec = LayerSpec(500, 64, 16, CP(row["rank"]), bias=False)
    assert found["flops"] == LayerConfig(spec, None, True).cost(1024).flops == row["flops"]
    assert "gather" in found["steps"][0]["label"]
    assert main(["plan", *words, "--gate", "entmax"]) == 2
    assert "--gate must be left out for embeddings" in capsys.readouterr().err
    assert main(["rank", *words, "--bias"]) == 2
    assert "--bias must be left out for embeddings" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["rank", "plan"])
def test_training_and_dtype_are_counted(capsys: pytest.CaptureFixture[str], command: str) -> None:
    words = (command, *SIZES, "--factorization", "cp", "--budget", "9k", "--device", "h100")
    spec = LayerSpec(96, 64, 16, CP(select_rank("cp", 96, 64, 16, budget=9_000)))
    for training in (False, True):
        for dtype, itemsize in (("float32", 4), ("bfloat16", 2), ("float64", 8)):
            more = ("--training",) if training else ("--no-training",)
            found = ask(capsys, *words, *more, "--dtype", dtype)
            values = found["rows"][0] if command == "rank" else found
            cost = LayerConfig(spec, Gate()).cost(1024, training=training, itemsize=itemsize)
            assert values["flops"] == cost.flops
            assert values["memory"] == cost.peak_memory
            assert values["saved_memory"] == cost.saved_memory
            assert found["request"]["dtype"] == dtype


def test_a_device_follows_the_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("rank", *SIZES, "--factorization", "cp")
    slow = ask(capsys, *words, "--device", "h100")["request"]["device"]
    fast = ask(capsys, *words, "--device", "h100", "--dtype", "bfloat16")["request"]["device"]
    assert fast["matmul_rate"] > 2 * slow["matmul_rate"]
    assert main([*words, "--device", "cpu", "--dtype", "bfloat16"]) == 2
    assert "--device" in capsys.readouterr().err


def test_rank_names_the_best_leg_of_every_row(
    capsys: pytest.CaptureFixture[str], profile_path: Path
) -> None:
    words = ("--devices", "4", "--device", "a100", "--gate", "none")
    found = ask(capsys, "rank", *SIZES, *words)
    for row in found["rows"]:
        if not row["feasible"]:
            continue
        rank = row["rank"] if isinstance(row["rank"], list) else [row["rank"]]
        given = ("--factorization", row["name"], "--rank", ",".join(map(str, rank)))
        plan = ask(capsys, "plan", *SIZES, *words, *given)
        assert plan["leg"] == row["leg"]
        assert plan["legs"][0]["time"] == pytest.approx(row["cut"]["time"])
        assert plan["communicated"] <= row["cut"]["communicated"]
    assert main(["rank", *SIZES, *words]) == 0
    assert "Cut over 4 devices" in capsys.readouterr().out
    # the link of a machine is not measured
    measured = replace(PUBLISHED_ROOFLINES["cpu"], name="this machine", link_bandwidth=None)
    profile_path.parent.mkdir(parents=True)
    profile_path.write_text(json.dumps(measured.to_dict()), "utf-8")
    assert main(["rank", *SIZES, "--devices", "4", "--device", "this"]) == 2
    assert "Pass --link" in capsys.readouterr().err
    assert main(["rank", *SIZES, "--link", "1GB"]) == 2
    assert "--link is for a layer cut over" in capsys.readouterr().err
    linked = ask(capsys, "rank", *SIZES, "--devices", "4", "--device", "this", "--link", "1GB")
    assert linked["request"]["device"]["link_bandwidth"] == 1e9


def test_a_block_is_cut_along_its_hidden_leg(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--kind", "gated", "--hidden", "48", "--devices", "2", "--device", "h100")
    found = ask(capsys, "plan", *SIZES, *words, "--rank", "8", "--training")
    cost = block("gated", factorization="cp", rank=8).shard(2).cost(1024, training=True)
    assert found["flops"] == cost.flops
    assert found["communicated"] == cost.communicated > 0
    assert (found["devices"], found["leg"]) == (2, "hidden")
    for more, said in (
        (("--leg", "o"), "--leg is for single layers"),
        (("--memory-limit", "64MiB"), "--memory-limit is for single layers"),
        (("--prepared",), "--prepared is for single layers"),
    ):
        assert main(["plan", *SIZES, *words, "--rank", "8", *more]) == 2
        assert said in capsys.readouterr().err


def test_a_block_of_coefficients_by_index(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--kind", "mlp", "--hidden", "48", "--rank", "8", "--top-k", "2")
    found = ask(capsys, "plan", *SIZES, *words)
    assert found["request"]["gate"] is None
    plan = plan_layer(block("mlp", factorization="cp", rank=8).first.spec.network, 1024, Routing(2))
    labels = [step.label for step in plan.cost().steps]
    assert [step["label"] for step in found["steps"]][: len(labels)] == labels


def test_networks_of_a_block_are_two_pictures(
    capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    path = tmp_path / "block.png"
    assert main(["plan", *SIZES, "--kind", "mlp", "--rank", "8", "--plot", str(path)]) == 0
    shown = capsys.readouterr().out
    for name in ("first", "second"):
        check_not_blank(tmp_path / f"block-{name}.png", least=200)
        assert f"block-{name}.png" in shown
    assert not path.exists()
    assert main(["rank", *SIZES, "--kind", "mlp", "--plot", str(path)]) == 0
    check_not_blank(path)


def test_the_star_says_why_and_what_changes_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("rank", "768", "10", "512")
    found = ask(capsys, *words)["best"]
    assert main([*words]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"* {found['reason']}." in shown
    for objective, name in found["others"].items():
        if objective != "capacity":
            assert f"--objective {objective} → {name}" in shown
            assert ask(capsys, *words, "--objective", objective)["best"]["name"] == name
