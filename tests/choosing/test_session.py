"""A session answers as `explore` does, and computes a row once."""

from __future__ import annotations

from typing import Any

import pytest

from tensormoe.choosing import Request, Session, _session, explore
from tensormoe.choosing._rows import Row, row

BASE: dict[str, Any] = {"in_features": 64, "out_features": 48, "experts": 16}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the rows that were computed."""
    names: list[str] = []

    def counted(request: Request, name: str) -> Row:
        names.append(name)
        return row(request, name)

    monkeypatch.setattr(_session, "row", counted)
    return names


CHANGES: list[dict[str, Any]] = [
    {"in_features": 32},
    {"out_features": 32},
    {"experts": "4x4"},
    {"kind": "mlp", "hidden_features": 40},
    {"kind": "mlp", "hidden_features": 41},
    {"budget": 9000},
    {"budget": 9000, "gate_in_budget": False},
    {"budget": {"flops": "9M"}},
    {"objective": "expert_span"},
    {"gate": "softmax"},
    {"gate": None},
    {"bias": False},
    {"batch": 7},
    {"training": True},
    {"dtype": "bfloat16"},
    {"device": "h100"},
    {"device": "h100", "devices": 4},
    {"bonds": {"tensor_ring": [2, 2, None]}},
    {"selected": "cp", "rank": 3},
    {"selected": "cp"},
    {"factorizations": ["cp", "tucker"]},
    {"in_features": 0},
]


def test_answers_are_those_of_explore(made: list[str]) -> None:
    session = Session()
    for _ in range(2):
        for change in CHANGES:
            for parts in (["rows"], ["selected", "baselines"]):
                asked = {**BASE, **change, "parts": parts}
                assert session.explore(asked) == explore(asked)


def test_a_row_is_computed_once(made: list[str]) -> None:
    session = Session()
    names = [each["name"] for each in session.explore({**BASE, "parts": ["rows"]})["rows"]]
    assert {*made} == {*names}
    first = list(made)
    for parts in ("baselines", "selected", "fronts", "rows"):
        session.explore({**BASE, "parts": [parts]})
        session.explore({**BASE, "parts": [parts], "selected": "cp"})
    session.explore({**BASE, "factorizations": ["cp"], "parts": ["fronts"]})
    assert made == first
    session.explore({**BASE, "parts": ["rows"], "selected": "cp", "rank": 3})
    assert {*made[len(first) :]} == {"cp"}


def test_rows_that_are_old_go(made: list[str]) -> None:
    session = Session()
    for size in range(1, 30):
        session.explore({**BASE, "in_features": size, "parts": ["rows", "others"]})
    assert session.rows == _session._KEPT
