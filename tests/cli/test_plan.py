"""``tensormoe plan``: the library's plan, its steps, and the drawing of every network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Hadamard,
    LayerSpec,
    LowRank,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe._drawing import network_lines
from tensormoe.cli import main
from tensormoe.planning import PUBLISHED_ROOFLINES
from tests._command import ask, check_not_blank


def test_plan_is_that_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--factorization", "tensor_ring", "--rank", "4,4,97", "--batch", "64")
    words += ("--gate", "none")
    found = ask(capsys, "plan", "768", "768", "512", *words)
    spec = LayerSpec(768, 768, 512, TensorRing((4, 4, 97)))
    cost = spec.cost(64)
    assert LayerSpec.from_dict(found["layers"][0]["spec"]) == spec
    assert found["flops"] == cost.flops
    assert found["memory"] == cost.peak_memory
    assert found["parameters"] == spec.num_parameters
    assert [step["label"] for step in found["steps"]] == [step.label for step in cost.steps]
    assert sum(step["matmul_flops"] for step in found["steps"]) == cost.matmul_flops
    assert sum(step["time"] for step in found["steps"]) == pytest.approx(found["time"])
    assert found["layers"][0]["dense"]["parameters"] == 512 * 769 * 768


def test_plan_of_gate_training_top_k_and_prepared(capsys: pytest.CaptureFixture[str]) -> None:
    layer = ("plan", "64", "64", "16", "--factorization", "tucker", "--rank", "4,8,8")
    spec = LayerSpec(64, 64, 16, Tucker((4, 8, 8)))
    plain = ask(capsys, *layer)
    for words in ([], ["--gate", "entmax"]):
        assert ask(capsys, *layer, *words)["flops"] == spec.cost(1024, gate="entmax").flops
    training = ask(capsys, *layer, "--training")
    assert training["flops"] == spec.cost(1024, gate="entmax", training=True).flops
    assert training["saved_memory"] > 0 == plain["saved_memory"]
    assert "gather" in ask(capsys, *layer, "--top-k", "2")["steps"][0]["label"]
    assert ask(capsys, *layer, "--prepared")["layers"][0]["prepared"] is True


def test_plan_under_a_memory_limit_adds_the_chunks_up(capsys: pytest.CaptureFixture[str]) -> None:
    layer = ("plan", "64", "64", "16", "--rank", "256", "--batch", "1000")
    whole = ask(capsys, *layer)
    cut = ask(capsys, *layer, "--memory-limit", "700KiB")
    (chunk,) = (each["chunk"] for each in cut["layers"])
    assert chunk < 1000 == whole["layers"][0]["chunk"]
    assert cut["memory"] <= 700 * 1024 < whole["memory"]
    assert cut["flops"] == whole["flops"]
    assert {step["count"] for step in cut["steps"]} == {-(-1000 // chunk)}


def test_plan_chooses_a_rank_by_budget(capsys: pytest.CaptureFixture[str]) -> None:
    # the gate comes on top without a budget, and counts against one
    for words, rank in (([], 288), (["--budget", "linear"], 96)):
        found = ask(capsys, "plan", "768", "768", "512", *words)
        assert found["layers"][0]["spec"]["rank"] == rank
    for words in (["--gate-on-top"], ["--gate", "none"]):
        found = ask(capsys, "plan", "768", "768", "512", "--budget", "linear", *words)
        assert found["layers"][0]["spec"]["rank"] == 288
    found = ask(capsys, "plan", "768", "768", "16x8", "--factorization", "hadamard")
    assert found["layers"][0]["spec"]["rank"] is None


def test_plan_shows_the_network_and_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--factorization", "tensor_ring", "--rank", "4,4,97", "--gate", "softmax"]
    assert main(["plan", "768", "768", "512", *words]) == 0
    text = capsys.readouterr().out
    assert "TensorRing(rank=(4, 4, 97))" in text
    assert "coefficients_0 ──●" in text
    for label in ("gate 0: softmax", "linear (b r2 r0) × (o r2 r0) → (b o)", "expert span 16"):
        assert label in text
    shares = [int(share) for share in re.findall(r"(\d+)%", text.split("parameters")[0])]
    assert abs(sum(shares) - 100) <= len(shares)


def test_plan_says_where_factorized_is_not_worth_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "8", "8", "2", "--rank", "64"]) == 0
    assert "not worth it" in capsys.readouterr().out
    assert main(["plan", "768", "768", "512", "--rank", "64"]) == 0
    assert "not worth it" not in capsys.readouterr().out


@pytest.mark.parametrize("experts", [(512,), (16, 8), (4, 3, 2)])
@pytest.mark.parametrize(
    "factorization",
    [
        CP(64),
        TensorRing(5),
        TensorTrain(9),
        Tucker(8),
        LowRank(9),
        SharedBasis(9),
        BaseDelta(2),
        SharedDelta(2),
        Hadamard(),
        Dense(),
    ],
    ids=lambda each: each.name,
)
def test_every_network_can_be_drawn(
    tmp_path: Path, factorization: Any, experts: tuple[int, ...]
) -> None:
    spec = LayerSpec(768, 384, experts, factorization)
    sizes: dict[str, int] = {}
    drawn = network_lines(spec.network)
    for term, wires in zip(spec.network.terms, drawn, strict=True):
        lines = ["".join(part for part, _ in line) for line in wires]
        # a dot for every leg of every array, and nothing but the batch left out
        dots = sum(len(factor.legs) for factor in term.factors)
        assert "".join(lines).count("●") == dots + len(experts) + 2
        assert lines[0].split() == list(dict.fromkeys(lines[0].split()))
        sizes |= dict(zip(lines[0].split(), map(int, lines[1].split()), strict=True))
    assert sizes == spec.network.sizes
    path = tmp_path / "network.png"
    words = ["plan", "768", "384", "x".join(map(str, experts)), "--plot", str(path)]
    rank = () if factorization.rank is None else ("--rank", str(factorization.rank))
    assert main([*words, "--factorization", factorization.name, *rank, "--json"]) == 0
    check_not_blank(path, least=200)


@pytest.mark.parametrize("words", [[], ["--training"], ["--top-k", "2", "--no-bias"]])
def test_plan_shows_the_table_of_the_library(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    spec = LayerSpec(64, 48, 16, CP(8), bias="--no-bias" not in words)
    top_k = 2 if "--top-k" in words else None
    text = spec.plan(1024, top_k=top_k).describe(
        None if top_k else "entmax",
        training="--training" in words,
        roofline=PUBLISHED_ROOFLINES["cpu"],
    )
    assert main(["plan", "64", "48", "16", "--rank", "8", "--device", "cpu", *words]) == 0
    title, rest = text.split("\n", 1)
    shown = capsys.readouterr().out
    assert title in shown
    assert rest in shown


def test_plan_of_one_device_of_several(capsys: pytest.CaptureFixture[str]) -> None:
    layer = ("plan", "768", "640", "512", "--rank", "256", "--gate", "none", "--device", "h100")
    spec = LayerSpec(768, 640, 512, CP(256))
    best = ask(capsys, *layer, "--devices", "8", "--training")
    assert (best["devices"], best["leg"], best["layers"][0]["spec"]) == (8, "r", spec.to_dict())
    cost = spec.shard("r", 8).cost(1024, training=True)
    assert best["parameters"] == cost.parameters
    assert (
        best["communicated"]
        == cost.communicated
        == sum(each["bytes"] for each in best["collectives"])
    )
    assert next(each["leg"] for each in best["legs"]) == "r"
    assert {each["leg"] for each in best["legs"]} == {"r", "i", "o", "n0"}
    sliced = ask(capsys, *layer, "--devices", "8", "--leg", "o", "--link", "1GB")
    assert sliced["collectives"] == []
    assert sliced["request"]["device"]["link_bandwidth"] == 1e9
    assert main([*layer, "--devices", "8", "--leg", "i"]) == 0
    shown = capsys.readouterr().out
    assert "one of 8 devices, each with 96 of the 768 of leg i" in shown
    assert re.search(r"i \* +96 of 768", shown)
    assert "all-reduce of y" in shown
