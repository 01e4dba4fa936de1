"""The tables of the paper that are counted, not measured, are printed as the page has them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import _mixtures_paper  # noqa: E402

PAGE = ROOT / "docs" / "mixtures" / "compared.md"


@pytest.mark.parametrize("table", ["parameters", "flops"])
def test_the_page_has_what_is_printed(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    _mixtures_paper.run([table])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) >= 4
    assert "\n".join(printed) in PAGE.read_text("utf-8")


def test_another_table_is_refused() -> None:
    with pytest.raises(SystemExit):
        _mixtures_paper.run(["accuracy"])
