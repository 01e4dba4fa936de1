"""The command line as people and programs use it: in this process and as a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Hadamard,
    LayerSpec,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
    select_rank,
)
from tensormoe.cli import main
from tensormoe.cli._network_text import draw_network, terms_of
from tensormoe.planning import PUBLISHED_ROOFLINES, Roofline, linear_cost, rank_front

ROOT = Path(__file__).resolve().parents[1]

FACTORIZATIONS = [
    "cp",
    "tensor_ring",
    "tensor_train",
    "tucker",
    "shared_basis",
    "base_delta",
    "shared_delta",
    "hadamard",
    "dense",
]


@pytest.fixture(autouse=True)
def profile_path(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a measured profile would be: there is none of the machine's own, and none is left."""
    folder = tmp_path_factory.mktemp("config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return folder / "tensormoe" / "roofline.json"


def run(
    *words: str, code: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command, or ``code``, in a process of its own that turns warnings into errors."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    start = ["-m", "tensormoe.cli"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, "-W", "error", *start, *words],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """What a command prints with --json; an error besides if nothing fits a budget."""
    code = main([*words, "--json"])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    nothing = words[0] == "rank" and found["best"] is None
    assert code == (2 if nothing else 0)
    assert captured.err.startswith("error: no factorization fits") == nothing
    return found


def check_not_blank(path: Path, least: int = 300) -> None:
    """A picture with something on it, and nothing cut off by its edges."""
    from matplotlib.image import imread

    pixels = imread(path)
    assert min(pixels.shape[:2]) >= least
    ink = (pixels[..., :3] < 0.95).any(axis=-1)
    assert 0.003 < ink.mean() < 0.6
    edges = (ink[0], ink[-1], ink[:, 0], ink[:, -1])
    assert not any(edge.any() for edge in edges)


# rank


def test_rank_answers_with_the_ranks_that_the_library_selects(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = ask(capsys, "rank", "768", "768", "512")
    assert found["command"] == "rank"
    assert found["experts"] == [512]
    assert found["budget"] == {"parameters": 590_592}
    assert [each["factorization"] for each in found["factorizations"]] == FACTORIZATIONS
    for each in found["factorizations"]:
        if not each["feasible"]:
            continue
        rank = select_rank(each["factorization"], 768, 768, 512)
        assert each["rank"] == (list(rank) if isinstance(rank, tuple) else rank)
        assert each["parameters"] <= 590_592
        front = rank_front(each["factorization"], 768, 768, 512)
        figures = [(point["expert_rank"], point["expert_span"]) for point in each["front"]]
        assert figures == [(point.expert_rank, point.expert_span) for point in front]
        assert (each["expert_rank"], each["expert_span"]) in figures
        assert each["time"] > 0
    best = max(
        (each for each in found["factorizations"] if each["feasible"]),
        key=lambda each: each["expert_rank"] * each["expert_span"],
    )
    assert found["best"] == best["factorization"]


def test_rank_shows_the_layers_of_the_same_size(capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys, "rank", "64", "32", "8", "--batch", "16", "--hidden", "100")
    rows = {row["layer"]: row for row in found["baselines"]}
    assert list(rows) == ["linear", "MLP", "dense MoE", "sparse MoE"]
    linear = linear_cost(64, 32, 16)
    assert rows["linear"]["flops"] == linear.flops
    assert rows["linear"]["memory"] == linear.peak_memory
    assert rows["linear"]["time"] == PUBLISHED_ROOFLINES["cpu"].time(linear)
    assert rows["MLP"]["parameters"] == 65 * 100 + 101 * 32
    assert rows["dense MoE"]["parameters"] == 8 * 65 * 32
    assert rows["sparse MoE"]["matmul_flops"] < rows["dense MoE"]["matmul_flops"]


@pytest.mark.parametrize(
    ("budget", "limit", "value"),
    [
        ("linear", "parameters", 65 * 64),
        ("mlp", "parameters", 65 * 256 + 257 * 64),
        ("12_000", "parameters", 12_000),
        ("4.5k", "parameters", 4_500),
        ("1e4", "parameters", 10_000),
        ("parameters=5K", "parameters", 5_000),
        ("flops=20M", "flops", 20_000_000),
        ("memory=1.5MiB", "memory", 1_572_864),
        ("memory=2MB", "memory", 2_000_000),
        ("time=300us", "time", 300e-6),
        ("time=.3 ms", "time", 300e-6),
    ],
)
def test_no_row_exceeds_the_budget(
    capsys: pytest.CaptureFixture[str], budget: str, limit: str, value: float
) -> None:
    for gate in ([], ["--gate", "softmax"]):
        found = ask(capsys, "rank", "64", "64", "16", "--budget", budget, *gate)
        assert found["budget"] == {limit: pytest.approx(value)}
        feasible = [each for each in found["factorizations"] if each["feasible"]]
        assert feasible
        assert all(each[limit] <= value * (1 + 1e-12) for each in feasible)


def test_an_impossible_budget_is_a_row_with_the_smallest_feasible_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = ask(capsys, "rank", "64", "64", "512", "--budget", "100")
    assert found["best"] is None
    for each in found["factorizations"]:
        assert each["feasible"] is False
        name, least = each["factorization"], int(each["smallest_budget"]["parameters"])
        select_rank(name, 64, 64, 512, budget=least)
        again = ask(
            capsys, "rank", "64", "64", "512", "--budget", str(least - 1), "--factorization", name
        )
        assert again["factorizations"][0]["smallest_budget"] == each["smallest_budget"]
    assert main(["rank", "64", "64", "512", "--budget", "100"]) == 2
    text = capsys.readouterr()
    assert "No factorization fits the budget." in text.out
    assert "cp is too large: it needs at least 641 parameters." in text.out
    assert "cp needs parameters at least 641. Raise the budget" in text.err


def test_several_limits_hold_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys, "rank", "64", "64", "16", "--budget", "parameters=9k,flops=15M,time=1ms")
    assert set(found["budget"]) == {"parameters", "flops", "time"}
    for each in found["factorizations"]:
        if each["feasible"]:
            assert all(each[limit] <= value for limit, value in found["budget"].items())


def test_bonds_stay_as_they_are_fixed(capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys, "rank", "768", "768", "512", "--bonds", "4,4,free")
    ranks = {each["factorization"]: each.get("rank") for each in found["factorizations"]}
    assert ranks["tensor_ring"] == [4, 4, 94]
    assert ranks["cp"] == 288
    given = ("--factorization", "tensor-train", "--bonds", "8,free")
    found = ask(capsys, "rank", "768", "768", "512", *given)
    assert found["factorizations"][0]["rank"][0] == 8
    given = ("--bonds", "tensor_ring=4,4,free", "--bonds", "tucker=2,free,free")
    found = ask(capsys, "rank", "768", "768", "512", *given)
    ranks = {each["factorization"]: each.get("rank") for each in found["factorizations"]}
    assert ranks["tensor_ring"][:2] == [4, 4]
    assert ranks["tucker"][0] == 2


def test_the_objective_decides_what_is_best(capsys: pytest.CaptureFixture[str]) -> None:
    layer = ("rank", "64", "64", "64", "--factorization", "tensor_ring")
    rows = {
        name: ask(capsys, *layer, "--objective", name)["factorizations"][0]
        for name in ("expert_rank", "expert_span")
    }
    assert rows["expert_rank"]["expert_rank"] > rows["expert_span"]["expert_rank"]
    assert rows["expert_rank"]["expert_span"] < rows["expert_span"]["expert_span"]


def test_rank_of_several_levels_and_of_experts_without_bias(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = ask(capsys, "rank", "64", "32", "4x3x2", "--no-bias", "--device", "h100")
    assert found["experts"] == [4, 3, 2]
    assert found["bias"] is False
    assert found["budget"] == {"parameters": 64 * 32}
    assert Roofline.from_dict(found["device"]) == PUBLISHED_ROOFLINES["h100"]


def test_the_table_fits_eighty_columns_and_names_the_budget() -> None:
    done = run("rank", "768", "768", "512", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "590,592 parameters" in done.stdout
    assert "No factorization exceeds the budget." in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("tensor_ring"))
    assert row.split()[1:3] == ["16,16,18", "573,728"]


def test_colour_follows_the_environment() -> None:
    words = ("rank", "64", "64", "16")
    assert "\033[" not in run(*words).stdout
    coloured = run(*words, FORCE_COLOR="1").stdout
    assert "\033[1;32m" in coloured
    plain = run(*words, FORCE_COLOR="1", NO_COLOR="1").stdout
    assert not re.search(r"\033\[[0-9;]*3[0-7]m", plain)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_rank_plots_the_front(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"front{suffix}"
    assert main(["rank", "64", "64", "32", "--plot", str(path)]) == 0
    assert f"drawn in {path}" in capsys.readouterr().out
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    if suffix == ".png":
        check_not_blank(path)


def test_a_plot_where_nothing_fits_says_so(tmp_path: Path) -> None:
    path = tmp_path / "front.png"
    assert main(["rank", "64", "64", "32", "--budget", "10", "--plot", str(path)]) == 2
    check_not_blank(path)


# plan


def test_plan_is_that_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--factorization", "tensor_ring", "--rank", "4,4,97", "--batch", "64")
    found = ask(capsys, "plan", "768", "768", "512", *words)
    spec = LayerSpec(768, 768, 512, TensorRing((4, 4, 97)))
    cost = spec.cost(64)
    assert LayerSpec.from_dict(found["spec"]) == spec
    assert found["flops"] == cost.flops
    assert found["memory"] == cost.peak_memory
    assert found["parameters"] == spec.num_parameters
    assert [step["label"] for step in found["steps"]] == [step.label for step in cost.steps]
    assert sum(step["matmul_flops"] for step in found["steps"]) == cost.matmul_flops
    assert sum(step["time"] for step in found["steps"]) == pytest.approx(found["time"])
    assert found["dense"]["parameters"] == 512 * 769 * 768


def test_plan_of_gate_training_top_k_and_prepared(capsys: pytest.CaptureFixture[str]) -> None:
    layer = ("plan", "64", "64", "16", "--factorization", "tucker", "--rank", "4,8,8")
    spec = LayerSpec(64, 64, 16, Tucker((4, 8, 8)))
    plain = ask(capsys, *layer)
    assert ask(capsys, *layer, "--gate", "entmax")["flops"] == spec.cost(1024, gate="entmax").flops
    training = ask(capsys, *layer, "--training")
    assert training["flops"] == spec.cost(1024, training=True).flops
    assert training["saved_memory"] > 0 == plain["saved_memory"]
    assert "gather" in ask(capsys, *layer, "--top-k", "2")["steps"][0]["label"]
    assert ask(capsys, *layer, "--prepared")["prepared"] is True


def test_plan_under_a_memory_limit_adds_the_chunks_up(capsys: pytest.CaptureFixture[str]) -> None:
    layer = ("plan", "64", "64", "16", "--rank", "256", "--batch", "1000")
    whole = ask(capsys, *layer)
    cut = ask(capsys, *layer, "--memory-limit", "700KiB")
    assert cut["chunk"] < 1000 == whole["chunk"]
    assert cut["memory"] <= 700 * 1024 < whole["memory"]
    assert cut["flops"] == whole["flops"]
    assert {step["count"] for step in cut["steps"]} == {-(-1000 // cut["chunk"])}


def test_plan_chooses_a_rank_by_budget(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--budget", "linear"]):
        found = ask(capsys, "plan", "768", "768", "512", *words)
        assert found["spec"]["rank"] == 288
    found = ask(capsys, "plan", "768", "768", "16x8", "--factorization", "hadamard")
    assert found["spec"]["rank"] is None


def test_plan_shows_the_network_and_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--factorization", "tensor_ring", "--rank", "4,4,97", "--gate", "softmax"]
    assert main(["plan", "768", "768", "512", *words]) == 0
    text = capsys.readouterr().out
    assert "TensorRing(rank=(4, 4, 97))" in text
    assert "coefficients_0 ──●" in text
    for label in ("gate 0: softmax", "linear (b r2 r0) × (o r2 r0) → (b o)", "expert span 16"):
        assert label in text
    shares = [int(share) for share in re.findall(r"(\d+)%", text)]
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
    for term, arrays in zip(spec.network.terms, terms_of(spec), strict=True):
        lines = [
            "".join(part for part, _ in line) for line in draw_network(arrays, spec.network.sizes)
        ]
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


# calibrate


def test_calibrate_keeps_a_profile_that_the_other_commands_use(
    capsys: pytest.CaptureFixture[str], profile_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # rough figures will do
    monkeypatch.setattr("tensormoe.cli._calibrate._SECONDS", 0.02)
    path = profile_path
    dry = ask(capsys, "calibrate", "--dry-run")
    assert dry["path"] is None
    assert not path.exists()
    assert main(["calibrate"]) == 0
    text = capsys.readouterr().out
    assert "FLOP/s" in text
    assert str(path) in text
    kept = Roofline.from_dict(json.loads(path.read_text("utf-8")))
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    # any machine that runs this: 10⁹ to 10¹⁴ FLOP/s, 10⁸ to 10¹³ B/s, 0.1 µs to 1 ms
    assert 1e9 < kept.matmul_rate < 1e14
    assert 1e8 < kept.elementwise_rate < kept.matmul_rate * 10
    assert 1e8 < kept.bandwidth < 1e13
    assert 1e-7 < kept.overhead < 1e-3
    for words in (["rank", "64", "64", "16"], ["plan", "64", "64", "16", "--device", "this"]):
        assert Roofline.from_dict(ask(capsys, *words)["device"]) == kept
    found = ask(capsys, "rank", "64", "64", "16", "--device", "cpu")
    assert found["device"]["name"] == "cpu"


def test_a_profile_that_cannot_be_used_is_said_so(
    capsys: pytest.CaptureFixture[str], profile_path: Path
) -> None:
    assert main(["rank", "64", "64", "16", "--device", "this"]) == 2
    assert "Run: tensormoe calibrate" in capsys.readouterr().err
    path = profile_path
    path.parent.mkdir(parents=True)
    for text in ("{", "[]", '{"name": "x"}', "\udcff"):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert main(["rank", "64", "64", "16"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: the profile at")
        assert error.count("\n") == 1


# demo


def test_demo_in_one_epoch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import numpy as np

    from tensormoe_numpy import MuMoE

    words = ["demo", "--epochs", "1", "--experts", "4x2", "--seed", "3", "--out"]
    found = ask(capsys, *words, str(tmp_path / "a"))
    assert [model["name"] for model in found["models"]] == [
        "CP",
        "tensor ring",
        "linear",
        "linear, wider",
    ]
    assert found["train_images"] + found["test_images"] == 1797
    budget = found["models"][2]["parameters"]
    assert budget == 65 * 64
    for model in found["models"][:2]:
        assert model["parameters"] <= budget
        assert model["gate_parameters"] == 64 * (4 + 2)
        assert 0.2 < min(model["accuracies"]) <= max(model["accuracies"]) <= 1.0
        assert found["max_relative_error"][model["name"]] < 1e-12
    # the wider layer has what the gates have, and no more
    factorized, wider = found["models"][0], found["models"][3]
    fair = budget + factorized["gate_parameters"] + 65 * 10
    assert fair - 75 < wider["all_parameters"] <= fair
    check_not_blank(tmp_path / "a" / "demo.png", least=900)
    names = {Path(name).name for name in found["files"]}
    assert names == {"cp.safetensors", "tensor_ring.safetensors", "demo.png"}
    assert {each.name for each in (tmp_path / "a").iterdir()} == names
    layer = MuMoE.load(tmp_path / "a" / "cp.safetensors")
    assert layer.spec.experts == (4, 2)
    assert np.isfinite(layer(np.ones((2, 64), "float32"))).all()
    again = ask(capsys, *words, str(tmp_path / "b"))
    assert [m["losses"] for m in again["models"]] == [m["losses"] for m in found["models"]]


def test_demo_tells_a_person_what_it_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["demo", "--epochs", "1", "--experts", "4", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for said in (
        "4,160 parameters of the linear layer",
        "largest relative error",
        "outputs equal to the last bit",
        "Means of 3 runs",
        str(tmp_path / "demo.png"),
    ):
        assert said in text


# errors


LAYER = ("64", "64", "16")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "COMMAND"),
        (["ranks"], "invalid choice: 'ranks'"),
        (["rank", "64"], "OUT, EXPERTS"),
        (["rank", "0", "64", "16"], "in_features must be a positive integer; got '0'"),
        (["rank", "64", "6.5", "16"], "out_features must be a positive integer; got '6.5'"),
        (["rank", "-3", "64", "16"], "got '-3'"),
        (["rank", "64", "64", "16x"], "got '' for level 1"),
        (["rank", "64", "64", "9" * 5000], "experts must be positive integers"),
        (["rank", *LAYER, "--budget", "cheap"], "budget must be linear, mlp"),
        (["rank", *LAYER, "--budget", "-5"], "budget must be"),
        (["rank", *LAYER, "--budget", "0"], "parameters of a budget must be"),
        (["rank", *LAYER, "--budget", "1e999"], "parameters of a budget must be"),
        (["rank", *LAYER, "--budget", "memory=5lb"], "64MiB; got '5lb'"),
        (["rank", *LAYER, "--budget", "time=5"], "2ms or 300us; got '5'"),
        (["rank", *LAYER, "--budget", "speed=5"], "budget must be"),
        (["rank", *LAYER, "--budget", "mlp,9k"], "limit parameters once"),
        (["rank", *LAYER, "--factorization", "svd"], "factorization must be one of cp"),
        (["rank", *LAYER, "--objective", "speed"], "--objective must be one of 'capacity'"),
        (["rank", *LAYER, "--device", "tpu"], "--device must be one of this"),
        (["rank", *LAYER, "--gate", "relu"], "activation must be one of entmax"),
        (["rank", *LAYER, "--batch", "many"], "--batch must be a positive integer"),
        (["rank", *LAYER, "--bonds", "4,4"], "rank must have 3 bonds"),
        (["rank", *LAYER, "--bonds", "4,-4,free"], "got '-4' for bond 1"),
        (["rank", *LAYER, "--bonds", "a,b,c"], "at most two symbols"),
        (["rank", *LAYER, "--bonds", "svd=4"], "--bonds must be for one of"),
        (["rank", *LAYER, "--bonds", "4,4,free", "--bonds", "4,4,free"], "given once"),
        (["plan", *LAYER, "--rank", "4,4"], "rank must be one positive integer"),
        (["plan", *LAYER, "--rank", "4,x"], "got 'x' for bond 1"),
        (["plan", *LAYER, "--rank", "0"], "rank must be positive integers; got '0' for bond 0"),
        (["plan", *LAYER, "--rank", "4", "--budget", "linear"], "exclude one another"),
        (["plan", *LAYER, "--factorization", "dense", "--rank", "4"], "rank must be None"),
        (["plan", *LAYER, "--factorization", "svd", "--rank", "4"], "factorization must be one"),
        (["plan", *LAYER, "--budget", "10"], "parameters must be at least"),
        (["plan", *LAYER, "--rank", "4", "--top-k", "99"], "top_k must be at most"),
        (["plan", *LAYER, "--rank", "4", "--memory-limit", "9"], "memory_limit must be at least"),
        (["plan", *LAYER, "--rank", "4", "--memory-limit", "x"], "--memory-limit must be"),
        (["plan", *LAYER, "--memory-limit", "1M", "--training"], "--memory-limit is for forward"),
        (["plan", *LAYER, "--plot", "x.bmp"], "--plot must end in one of .png, .svg, .pdf"),
        (["plan", *LAYER, "--plot", "png"], "--plot must end in one of"),
        (["plan", *LAYER, "--plot", "/no/such/folder/x.png"], "the folder of --plot must exist"),
        (["plan", *LAYER, "--plot", "/dev/null/x.png"], "the folder of --plot must exist"),
        (["demo", "--epochs", "0"], "--epochs must be a positive integer"),
        (["demo", "--seed", "-1"], "--seed must be an integer of at least 0; got '-1'"),
        (["demo", "--seed", "x"], "--seed must be an integer of at least 0"),
        (["demo", "--experts", "none"], "experts must be positive integers"),
        (["demo", "--out", "/dev/null/x"], "can't be made a folder"),
    ],
)
def test_bad_words_are_one_clear_line(
    capsys: pytest.CaptureFixture[str], words: Sequence[str], said: str
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_a_plot_that_cannot_be_written_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # the folder can be written, but no file has so long a name
    assert main(["rank", *LAYER, "--plot", str(tmp_path / ("a" * 300 + ".png"))]) == 2
    assert "could not be written" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.p*"))
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "x.png").mkdir()
    assert main(["rank", *LAYER, "--plot", str(tmp_path / "x.png")]) == 2
    assert "can be written" in capsys.readouterr().err


def test_errors_of_a_process_have_no_traceback() -> None:
    done = run("plan", "64", "64", "16", "--rank", "4,4")
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.startswith("error: rank must be one positive integer; got (4, 4).")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("missing", "words", "extra"),
    [
        ("rich", ["rank", *LAYER], "cli"),
        ("matplotlib", ["rank", *LAYER, "--json", "--plot", "x.png"], "cli"),
        ("platformdirs", ["rank", *LAYER, "--device", "this"], "cli"),
        ("numpy", ["calibrate"], "numpy"),
        ("sklearn", ["demo"], "demo"),
        ("matplotlib", ["demo"], "demo"),
    ],
)
def test_a_missing_package_names_its_extra(
    tmp_path: Path, missing: str, words: list[str], extra: str
) -> None:
    hide = f"""
import os, sys
os.chdir({str(tmp_path)!r})
sys.modules[{missing!r}] = None
from tensormoe.cli import main
sys.exit(main({words!r}))
"""
    done = run(code=hide)
    assert done.returncode == 2, done.stderr
    assert missing in done.stderr
    assert f"pip install 'tensormoe[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


def test_json_needs_no_extra() -> None:
    hide = f"""
import sys
for name in ("rich", "platformdirs", "matplotlib", "numpy"):
    sys.modules[name] = None
from tensormoe.cli import main
sys.exit(main(["rank", *{LAYER!r}, "--json"]) or main(["plan", *{LAYER!r}, "--json"]))
"""
    done = run(code=hide)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"command"') == 2


# the process


def test_help_and_version() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("rank", "plan", "calibrate", "demo"):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)
        assert "usage: tensormoe " + command in run(command, "--help").stdout
    assert run("--version").stdout.startswith("tensormoe ")


def test_help_loads_nothing_heavy() -> None:
    watch = """
import sys
from tensormoe.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
heavy = {"numpy", "opt_einsum", "rich", "matplotlib", "platformdirs", "scipy", "sklearn"}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    assert run(code=watch).stderr == "[]\n"


def test_output_that_cannot_be_encoded_is_no_failure() -> None:
    done = run("plan", *LAYER, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "CP(rank=" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="pipes and signals as POSIX has them")
def test_a_reader_that_goes_away_is_no_error() -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    for words in ("rank 64 64 16", "rank 64 64 16 --json"):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "tensormoe.cli", *words.split()],
            env={**os.environ, "PYTHONPATH": path},
            stdout=writing,
            stderr=subprocess.PIPE,
            check=False,
        )
        os.close(writing)
        assert done.returncode == 1
        assert done.stderr == b""


@pytest.mark.skipif(os.name != "posix", reason="pipes and signals as POSIX has them")
def test_an_interrupt_is_status_130(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    words = ["demo", "--epochs", "100000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tensormoe.cli", *words],
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs ignore interrupts, and so do their children unless told
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Training" in line:
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors == "error: interrupted.\n"
