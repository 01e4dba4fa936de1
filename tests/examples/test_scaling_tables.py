"""The page on scaling has the tables that the cost model gives, and what it says of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import study_scaling  # noqa: E402
from study_scaling import Split, fitted, splits  # noqa: E402

PAGE = (ROOT / "docs" / "scaling.md").read_text("utf-8")


def test_the_page_has_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    study_scaling.main()
    printed = capsys.readouterr().out
    tables = [each.strip() for each in printed.split("\n\n") if each.startswith("|")]
    assert len(tables) == 2
    for table in tables:
        assert len(table.splitlines()) >= 6
        assert table in PAGE


def test_what_the_page_says_of_512_devices() -> None:
    found = {(each.cut, each.devices): fitted(each)[1] for each in splits(512)}
    able = {pair: each for pair, each in found.items() if each.memory <= study_scaling.MEMORY}
    rank, hidden, whole = found["rank", 8], found["hidden", 8], found["none", 1]
    assert min(able, key=lambda pair: able[pair].total) == ("none", 1)
    assert 0.75 < whole.total / rank.total < 0.85
    assert 0.28 < rank.sent[1] / whole.sent[1] < 0.38
    assert 15 < rank.sent[0] / rank.sent[1] < 25
    assert 0.2 < hidden.sent[0] / rank.sent[0] < 0.3
    assert hidden.total > rank.total
    for cut in ("hidden", "rank"):
        wide = found[cut, 64]
        assert wide.seconds[1] > 2 * wide.seconds[0]
    assert found["rank", 64].seconds[1] > 10 * found["rank", 64].seconds[0]


def test_what_the_page_says_of_other_numbers() -> None:
    assert all(fitted(each)[1].memory > study_scaling.MEMORY for each in splits(8))
    alone, *others = (fitted(each) for each in splits(4096))
    assert alone[0].tokens == 1024
    best = min(others, key=lambda pair: pair[1].total)
    assert (best[0].cut, best[0].devices) == ("rank", 8)
    assert best[1].total < alone[1].total


def test_the_gate_is_on_every_device() -> None:
    block = Split("rank", 8, 64).block()
    assert round(100 * block.first.gate_parameters / 1e9, 1) == 2.5
    assert round(100 * block.num_parameters / 1e9, 1) == 9.2
