"""What README.md and the start pages claim in figures, links and lines is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tensormoe import CP, Gate, LayerSpec, TensorRing, select_rank
from tensormoe.functional import LayerConfig
from tensormoe.selection import linear_cost, mlp_cost

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
START = sorted((ROOT / "docs" / "start").glob("*.md"))
PAGES = [
    ROOT / "README.md",
    *START,
    *(ROOT / "docs" / f"{name}.md" for name in ("index", "limits", "gallery")),
]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def text_of(page: Path) -> str:
    return page.read_text("utf-8")


def test_claim() -> None:
    sizes = (768, 768, (16, 32))
    rank = select_rank("tensor_ring", *sizes, budget="linear")
    assert isinstance(rank, tuple)
    config = LayerConfig(LayerSpec(*sizes, TensorRing(rank)), Gate())
    linear = linear_cost(768, 768, 1024)
    ratio = config.spec.cost(1024, gate=Gate()).flops / linear.flops
    claim = " ".join(README.split("![")[0].split())
    assert f"{config.spec.num_experts} experts of 768 → 768 in {config.num_parameters:,}" in claim
    assert f"replace has {linear.parameters:,}; 512 dense experts would have 302 million" in claim
    assert round(512 * linear.parameters / 1e6) == 302
    assert f"for {ratio:.2f} times the FLOPs" in claim
    for place in (ROOT / "docs" / "index.md", ROOT / "docs" / "images" / "layer.svg"):
        assert f"{config.num_parameters:,}" in text_of(place)


def cells(text: str) -> dict[str, list[str]]:
    """The rows of the table of blocks, by their first cell."""
    rows = re.findall(r"^\| (linear layer|MLP|[`\w].*?MoE.*?) \|(.*)\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}


def test_table() -> None:
    """The README's figures are those of the experiments, and those that need no run are so."""
    experiments = (ROOT / "docs" / "experiments.md").read_text("utf-8")
    section = experiments.split("## One block at equal parameters")[1].split("\n## ")[0]
    table, full = cells(README), cells(section)
    assert len(table) == 7
    for name, (experts, parameters, flops, step, accuracy) in table.items():
        found = full[name]
        assert [experts, parameters, flops, step, accuracy] == [*found[:3], *found[4:6]]
    limit = mlp_cost(64, 256, 64, 1).parameters
    assert table["MLP"][1] == f"{limit:,}"
    assert all(int(row[1].replace(",", "")) <= limit for row in table.values())
    spec = LayerSpec(64, 64, 64, CP(select_rank("cp", 64, 64, 64, budget=limit)))
    assert table["`MuMoE`, CP"][1] == f"{LayerConfig(spec, Gate()).num_parameters:,}"


def test_first_screen() -> None:
    """Both commands are where a reader is who has not scrolled much."""
    lines = README.splitlines()
    for command in ("make demo", "make test", "pip install '.[torch]'"):
        assert any(line.startswith(command) for line in lines[:42]), command


@EACH_PAGE
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#][^)]*)\)", text_of(page)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve()
            assert found.is_file(), target
            assert not anchor or anchor in anchors(text_of(found)), target


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@EACH_PAGE
def test_code_fits(page: Path) -> None:
    """Blocks have at most 80 columns."""
    for block in re.findall(r"^```\w+\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE):
        long = [line for line in block.splitlines() if len(line) > 80]
        assert not long


@pytest.mark.parametrize(
    "example", sorted((ROOT / "examples").glob("[!_]*.py")), ids=lambda e: e.stem
)
def test_gallery_has_every_example(example: Path) -> None:
    assert f"python examples/{example.name}" in text_of(ROOT / "docs" / "gallery.md")
