"""The page of what works where: each tick is a test, and the page is what the tests say."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")
pytest.importorskip("equinox")
pytest.importorskip("optax")
pytest.importorskip("cupy")

from tests.support._rows import HEAD, TABLES
from tests.support._table import COMMAND, PAGE, Missing, Row, Table, render

PROBES = [probe for table in TABLES for probe in table.probes()]


@pytest.mark.parametrize("probe", [pytest.param(probe, id=name) for name, probe in PROBES])
def test_cell(probe: Callable[[], None]) -> None:
    probe()


def test_the_page_is_what_the_tests_say() -> None:
    assert PAGE.read_text("utf-8") == render(HEAD, TABLES), f"Run: {COMMAND}"


def test_every_cell_is_a_tick_or_has_a_note() -> None:
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    ticks = sum(line.count("✓") for line in lines)
    dashes = sum(line.count("–[^") for line in lines)
    assert ticks == len(PROBES)
    assert ticks + dashes == sum(len(row.cells) for table in TABLES for row in table.rows)


def test_a_table_is_rendered() -> None:
    row = Row("speed", (lambda: None, Missing("Too new.")))
    again = Row("size", (Missing("Too new."), Missing("Too old.")))
    table = Table("Things", "A text.", "thing", ("one", "other"), (row, again))
    assert [name for name, _ in table.probes()] == ["Things: speed: one"]
    assert render("# Head\n", [table]) == (
        "# Head\n\n\n## Things\n\nA text.\n\n"
        "| thing | one | other |\n| --- | :---: | :---: |\n"
        "| speed | ✓ | –[^1] |\n| size | –[^1] | –[^2] |\n\n"
        "[^1]: Too new.\n\n[^2]: Too old.\n"
    )
