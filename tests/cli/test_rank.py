"""``tensormoe rank``: what it answers, within which budgets, in a table and in a plot."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tensormoe import select_rank
from tensormoe.cli import main
from tensormoe.errors import BudgetError
from tensormoe.planning import PUBLISHED_ROOFLINES, Roofline
from tensormoe.selection import linear_cost, rank_front
from tests._command import ask, check_not_blank, run

FACTORIZATIONS = [
    "cp",
    "tensor_ring",
    "tensor_train",
    "tucker",
    "low_rank",
    "shared_basis",
    "base_delta",
    "shared_delta",
    "hadamard",
    "dense",
]


def test_rank_answers_with_the_ranks_that_the_library_selects(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = ask(capsys, "rank", "768", "768", "512")
    assert found["command"] == "rank"
    assert found["request"]["experts"] == [512]
    assert found["request"]["budget"] == {"parameters": 590_592}
    assert [each["name"] for each in found["rows"]] == FACTORIZATIONS
    for each in found["rows"]:
        if not each["feasible"]:
            continue
        rank = select_rank(each["name"], 768, 768, 512)
        assert each["rank"] == (list(rank) if isinstance(rank, tuple) else rank)
        # without a budget the gate comes on top
        assert each["parameters"] - 768 * 512 <= 590_592
        front = rank_front(each["name"], 768, 768, 512)
        figures = [
            (point["expert_rank"], point["expert_span"]) for point in found["fronts"][each["name"]]
        ]
        assert figures == [(point.expert_rank, point.expert_span) for point in front]
        assert (each["expert_rank"], each["expert_span"]) in figures
        assert each["time"] > 0
    rows = [each for each in found["rows"] if each["feasible"]]
    highest = max(each["expert_rank"] for each in rows)
    best = max(
        (each for each in rows if each["expert_rank"] >= highest / 2),
        key=lambda each: each["expert_rank"] * each["expert_span"],
    )
    assert found["best"]["name"] == best["name"]


def test_rank_shows_the_layers_of_the_same_size(capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys, "rank", "64", "32", "8", "--batch", "16", "--hidden", "100")
    rows = {row["name"]: row for row in found["baselines"]}
    assert list(rows) == ["linear", "MLP", "dense MoE", "sparse MoE", "soft MoE"]
    linear = linear_cost(64, 32, 16)
    assert rows["linear"]["flops"] == linear.flops
    assert rows["linear"]["memory"] == linear.peak_memory
    assert rows["linear"]["time"] == PUBLISHED_ROOFLINES["cpu"].time(linear)
    assert rows["MLP"]["parameters"] == 65 * 100 + 101 * 32
    assert rows["dense MoE"]["parameters"] == 8 * 65 * 32 + 64 * 8
    assert found["gate"]["parameters"] == 64 * 8
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
    for gate in ([], ["--gate", "softmax"], ["--gate", "none"]):
        found = ask(capsys, "rank", "64", "64", "16", "--budget", budget, *gate)
        assert found["request"]["budget"] == {limit: pytest.approx(value)}
        feasible = [each for each in found["rows"] if each["feasible"]]
        assert feasible
        assert all(each[limit] <= value * (1 + 1e-12) for each in feasible)


def test_an_impossible_budget_is_a_row_with_the_smallest_feasible_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = ask(capsys, "rank", "64", "64", "512", "--budget", "100")
    assert found["best"] is None
    for each in found["rows"]:
        assert each["feasible"] is False
        name, least = each["name"], int(each["smallest_budget"]["parameters"])
        select_rank(name, 64, 64, 512, budget=least)
        again = ask(
            capsys, "rank", "64", "64", "512", "--budget", str(least - 1), "--factorization", name
        )
        assert again["rows"][0]["smallest_budget"] == each["smallest_budget"]
    assert main(["rank", "64", "64", "512", "--budget", "100"]) == 2
    text = capsys.readouterr()
    assert "No factorization fits the budget." in text.out
    assert "cp is too large: it needs at least 33,409 parameters." in text.out
    assert "cp needs parameters at least 33409. Raise the budget" in text.err


def test_an_impossible_budget_shows_the_alternatives_of_the_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("rank", "64", "64", "512", "--budget", "9k", "--factorization", "cp")
    with pytest.raises(BudgetError) as caught:
        select_rank("cp", 64, 64, 512, budget=9000)
    (row,) = ask(capsys, *words)["rows"]
    split, bare = caught.value.alternatives
    assert row["smallest_budget"] == caught.value.needed
    assert row["alternatives"] == [
        {"change": {"experts": [16, 32]}, "smallest_budget": split.needed},
        {"change": {"gate": False}, "smallest_budget": bare.needed},
    ]
    assert main(list(words)) == 2
    shown = capsys.readouterr().out
    assert f"{split.needed['parameters']:,} parameters with 16x32." in shown
    assert f"{bare.needed['parameters']:,} parameters with --gate-on-top." in shown
    # and the words that it shows do what it says
    assert ask(capsys, "rank", "64", "64", "16x32", *words[4:])["best"]["name"] == "cp"
    assert ask(capsys, *words, "--gate-on-top")["best"]["name"] == "cp"


def test_several_limits_hold_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys, "rank", "64", "64", "16", "--budget", "parameters=9k,flops=15M,time=1ms")
    assert set(found["request"]["budget"]) == {"parameters", "flops", "time"}
    for each in found["rows"]:
        if each["feasible"]:
            assert all(each[limit] <= value for limit, value in found["request"]["budget"].items())


def test_bonds_stay_as_they_are_fixed(capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys, "rank", "768", "768", "512", "--bonds", "4,4,free")
    ranks = {each["name"]: each.get("rank") for each in found["rows"]}
    assert ranks["tensor_ring"] == [4, 4, 94]
    assert ranks["cp"] == 288
    given = ("--factorization", "tensor-train", "--bonds", "8,free")
    found = ask(capsys, "rank", "768", "768", "512", *given)
    assert found["rows"][0]["rank"][0] == 8
    given = ("--bonds", "tensor_ring=4,4,free", "--bonds", "tucker=2,free,free")
    found = ask(capsys, "rank", "768", "768", "512", *given)
    ranks = {each["name"]: each.get("rank") for each in found["rows"]}
    assert ranks["tensor_ring"][:2] == [4, 4]
    assert ranks["tucker"][0] == 2


def test_the_objective_decides_what_is_best(capsys: pytest.CaptureFixture[str]) -> None:
    layer = ("rank", "64", "64", "64", "--factorization", "tensor_ring")
    rows = {
        name: ask(capsys, *layer, "--objective", name)["rows"][0]
        for name in ("expert_rank", "expert_span")
    }
    assert rows["expert_rank"]["expert_rank"] > rows["expert_span"]["expert_rank"]
    assert rows["expert_rank"]["expert_span"] < rows["expert_span"]["expert_span"]


def test_rank_of_several_levels_and_of_experts_without_bias(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = ask(capsys, "rank", "64", "32", "4x3x2", "--no-bias", "--device", "h100")
    assert found["request"]["experts"] == [4, 3, 2]
    assert found["request"]["bias"] is False
    assert found["request"]["budget"] == {"parameters": 64 * 32}
    assert Roofline.from_dict(found["request"]["device"]) == PUBLISHED_ROOFLINES["h100"]


def test_the_table_fits_eighty_columns_and_names_the_budget() -> None:
    done = run("rank", "768", "768", "512", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "590,592 parameters" in done.stdout
    assert "No factorization exceeds the budget." in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("tensor_ring"))
    # the best of all, with a star: 22² directions of rank 220
    assert row.split()[1:4] == [
        "*",
        "22,22,10",
        f"{512 * 22**2 + 22 * 10 * (769 + 768) + 393_216:,}",
    ]
    gate = next(line for line in done.stdout.splitlines() if line.startswith("gate"))
    assert gate.split()[2] == "393,216"


@pytest.mark.parametrize("gate", ["entmax", "top-k", "none"])
@pytest.mark.parametrize("experts", ["64", "8x8"])
def test_rank_and_plan_mean_the_same_by_a_budget(
    capsys: pytest.CaptureFixture[str], experts: str, gate: str
) -> None:
    layer = ("96", "64", experts, "--gate", gate, "--factorization", "cp", "--budget", "9k")
    paid = {"none": 0}.get(gate, 96 * (64 if experts == "64" else 16))
    for extra, left in (((), 9_000 - paid), (("--gate-on-top",), 9_000)):
        rank = ask(capsys, "rank", *layer, *extra)["rows"][0]
        plan = ask(capsys, "plan", *layer, *extra)
        assert rank["rank"] == plan["layers"][0]["spec"]["rank"]
        assert rank["parameters"] == plan["parameters"]
        assert plan["gate_parameters"] == paid
        assert 0.9 * left < plan["parameters"] - paid <= left


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
