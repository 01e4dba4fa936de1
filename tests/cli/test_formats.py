"""The same answer as a table, as JSON, as CSV and as Markdown; and tables on narrow terminals."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown import markdown
from rich.console import Console

from tensormoe import CP, Dense
from tensormoe._format import format_bytes, format_count, format_parameters, format_time
from tensormoe.choosing import explore
from tensormoe.choosing._schema import response_schema
from tensormoe.cli import main
from tensormoe.cli._columns import format_ranks, format_whole
from tensormoe.cli._console import make_table
from tensormoe.cli.calibration import Samples
from tests._command import LAYER, ask
from tests._compress_models import PATTERN, experts, save_shards

RANK = ("rank", "96", "64", "16", "--budget", "20k")
PLAN = ("plan", "96", "64", "16", "--rank", "8")
BLOCK = ("plan", "96", "64", "16", "--kind", "gated", "--hidden", "48", "--rank", "8")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def records(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_json_is_the_response_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys, *RANK)
    again = json.loads(printed(capsys, *RANK, "--format", "json"))
    assert found == again
    assert found.pop("command") == "rank"
    request = {"in_features": 96, "out_features": 64, "experts": "16", "budget": "20k"}
    wanted = explore({**request, "parts": ["rows", "others", "baselines", "fronts"]})
    assert found == json.loads(json.dumps(wanted))
    assert {*found} <= {*response_schema()["properties"]}


def test_csv_of_rank_has_a_row_for_each_layer_and_plain_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = ask(capsys, *RANK)
    rows = {row["layer"]: row for row in records(printed(capsys, *RANK, "--format", "csv"))}
    assert [*rows] == [each["name"] for each in (*found["rows"], *found["baselines"])] + ["gate"]
    for each in found["rows"]:
        row = rows[each["name"]]
        assert row["best"] == str(int(each["name"] == found["best"]["name"]))
        if not each["feasible"]:
            assert row["smallest budget"] == f"parameters={each['smallest_budget']['parameters']}"
            assert not row["FLOPs"]
            continue
        assert int(row["parameters"]) == each["parameters"]
        assert int(row["memory [B]"]) == each["memory"]
        assert float(row["time [s]"]) == each["time"]
        assert int(row["expert rank"]) == each["expert_rank"]
        assert row["rank"] == ("" if each["rank"] is None else format_ranks(each["ranks"]))
    fronts = records(printed(capsys, *RANK, "--format", "csv", "--front"))
    assert len(fronts) == sum(len(front) for front in found["fronts"].values())


@pytest.mark.parametrize("words", [PLAN, BLOCK])
def test_csv_of_plan_has_a_row_for_each_step(
    capsys: pytest.CaptureFixture[str], words: Sequence[str]
) -> None:
    found = ask(capsys, *words)
    rows = records(printed(capsys, *words, "--format", "csv"))
    assert [row["step"] for row in rows] == [step["label"] for step in found["steps"]]
    total = sum(int(row["FLOPs in matrix products"]) for row in rows)
    assert total == found["matmul_flops"]
    moved = sum(int(row["read [B]"]) + int(row["written [B]"]) for row in rows)
    assert moved == found["bytes_moved"]


def tables(text: str) -> list[list[list[str]]]:
    """Cells of every table that Markdown renders."""
    page = ElementTree.fromstring(f"<page>{markdown(text, extensions=['tables'])}</page>")
    return [
        [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
        for table in page.iter("table")
    ]


def test_markdown_renders_every_row_and_note(capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys, *RANK)
    text = printed(capsys, *RANK, "--format", "markdown")
    (table,) = tables(text)
    assert table[0][:3] == ["layer", "rank", "parameters"]
    assert len({len(row) for row in table}) == 1
    names = [row[0].removesuffix(" *") for row in table[1:]]
    assert names == [each["name"] for each in found["rows"]] + ["gate"] + [
        each["name"] for each in found["baselines"]
    ]
    (star,) = (row[0] for row in table if row[0].endswith(" *"))
    assert star == f"{found['best']['name']} *"
    html = markdown(text, extensions=["tables"])
    assert "<em>" not in html
    assert html.count("<li>") == sum(line.startswith("- ") for line in text.splitlines())
    assert len(tables(printed(capsys, *RANK, "--front", "--format", "markdown"))) == 2


def test_markdown_of_plans_has_a_table_for_each_layer(capsys: pytest.CaptureFixture[str]) -> None:
    for words, layers in ((PLAN, 1), (BLOCK, 2)):
        found = tables(printed(capsys, *words, "--format", "markdown"))
        assert len(found) == layers
        for table in found:
            assert table[0] == ["step", "count", "FLOPs", "bytes", "time"]
            assert {len(row) for row in table} == {5}


def test_fronts_are_asked_for_where_they_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        "tensormoe.choosing._explore.fronts", lambda request, name: asked.append(name) or ()
    )
    for form in ("table", "csv", "markdown"):
        printed(capsys, *RANK, "--format", form)
    assert not asked
    printed(capsys, *RANK, "--front")
    assert len(asked) == 10


def flat(text: str) -> str:
    """Text without breaks, rules and dots between figures."""
    return " ".join(re.sub(r"[·─/]", " ", text).split())


def check_width(text: str, width: int) -> None:
    # paths are never broken: terminals wrap them, and people copy them
    lines = [line for line in text.splitlines() if not line.startswith("/")]
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("width", [50, 40])
@pytest.mark.parametrize("more", [(), ("--devices", "2", "--device", "h100"), ("--kind", "mlp")])
def test_narrow_terminals_show_every_figure_of_rank(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    more: tuple[str, ...],
) -> None:
    found = ask(capsys, *RANK, *more)
    monkeypatch.setenv("COLUMNS", str(width))
    text = printed(capsys, *RANK, *more)
    check_width(text, width)
    shown = flat(text)
    for each in (*found["rows"], *found["baselines"]):
        assert each["name"] in shown
        if not each["feasible"]:
            continue
        figures: list[str] = [
            format_ranks(each["ranks"]).replace("–", ""),
            f"parameters {format_parameters(each['parameters'])}",
            f"FLOPs {format_count(each['flops'])}",
            f"memory {format_bytes(each['memory'])}",
            f"time {format_time(each['time'])}",
        ]
        if each["expert_rank"] is not None:
            figures.append(f"expert rank {format_whole(each['expert_rank'])}")
        if "cut" in each:
            figures += [f"best leg {each['leg']}", format_time(each["cut"]["time"])]
        for figure in figures:
            assert flat(figure) in shown


@pytest.mark.parametrize("width", [50, 40])
@pytest.mark.parametrize(
    "words",
    [
        (*PLAN, "--training"),
        BLOCK,
        (*PLAN, "--devices", "2", "--device", "h100"),
        ("plan", *LAYER, "--factorization", "tucker", "--rank", "4,8,8"),
    ],
)
def test_narrow_terminals_show_every_step_of_plan(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    words: tuple[str, ...],
) -> None:
    found = ask(capsys, *words)
    monkeypatch.setenv("COLUMNS", str(width))
    text = printed(capsys, *words)
    check_width(text, width)
    shown = flat(text)
    for step in found["steps"]:
        if step["count"] == 1:
            assert flat(step["label"]) in shown
            assert format_time(step["time"]) in shown
    assert f"{found['flops']:,}" in shown
    assert format_bytes(found["memory"]) in shown
    for leg in found.get("legs", ()):
        assert f"{leg['leg']} " in shown
        assert format_bytes(leg["communicated"]) in shown


@pytest.mark.parametrize("width", [50, 40])
def test_narrow_terminals_show_every_figure_of_the_other_commands(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    width: int,
) -> None:
    # rough figures will do; what is shown of each layer is what is checked for
    few = [
        Samples(size, 24, 4, kind, (1, 3, 20)) for size in (8, 20, 32) for kind in (CP(5), Dense())
    ]
    monkeypatch.setattr("tensormoe.cli.calibration._SECONDS", 0.001)
    monkeypatch.setattr("tensormoe.cli.calibration.SAMPLES", few)
    monkeypatch.setattr("tensormoe.cli.calibration._CHECKED", few[:2])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(width))
    text = printed(capsys, "calibrate", "--dry-run")
    check_width(text, width)
    shown = flat(text)
    assert shown.count("predicted") >= 4
    assert "elementwise work of gates" in shown
    assert "…" not in shown
    text = printed(capsys, "config", "rank", "plan")
    check_width(text, width)
    assert "objective" in text
    assert "capacity" in text
    assert "…" not in text


@pytest.mark.parametrize("width", [80, 50, 40, 20])
def test_a_table_never_cuts_a_cell_off(width: int) -> None:
    cells: list[list[Any]] = [["cp", "288", "590,592", "1.21 G"], ["a " * 20, "4,4,97", "7", "–"]]
    table = make_table("layer", "rank", "parameters", "FLOPs\nof all", left=2)
    for row in cells:
        table.add_row(*row)
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for row in cells:
        assert all(flat(cell) in flat(text) for cell in row if cell != "–")


def test_narrow_terminals_show_every_figure_of_the_demo(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    width = 40
    monkeypatch.setenv("COLUMNS", str(width))
    text = printed(capsys, "demo", "--epochs", "1", "--experts", "4", "--out", str(tmp_path))
    assert "…" not in text
    shown = flat(text)
    assert shown.count("all with head") == 4
    assert shown.count("accuracy ") >= 4
    assert shown.count("expert span") == 4
    for line in text.splitlines():
        assert len(line) <= width or str(tmp_path) in line


@pytest.mark.parametrize("width", [50, 40])
def test_narrow_terminals_show_every_figure_of_compress(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    rng: np.random.Generator,
    width: int,
) -> None:
    model = save_shards(tmp_path / "model", experts(rng), experts(rng, rows=12, layer=1))
    words = ("compress", str(model), "--experts", *PATTERN, "--budget", "50%")
    words += ("--factorization", "cp", "--seconds", "5")
    plan = ask(capsys, *words, "--dry-run")
    monkeypatch.setenv("COLUMNS", str(width))
    shown = flat(printed(capsys, *words, "--dry-run"))
    for group in plan["groups"]:
        assert f"before {format_parameters(group['dense_parameters'])}" in shown
        assert f"memory {format_bytes(group['memory'])}" in shown
    text = printed(capsys, *words, "--output", str(tmp_path / "small"))
    table = text[text.index("joint SVD") :]
    assert "…" not in table
    shown = flat(text)
    assert shown.count("SVD error") >= len(plan["groups"])
    for group in plan["groups"]:
        assert f"before {format_parameters(group['dense_parameters'])}" in shown
