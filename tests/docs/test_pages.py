"""Pages as they are written: narrow code, legible colours, and all that they load in place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^ *```(\w*).*\n((?:.*\n)*?) *```$", re.MULTILINE)
COLUMNS = 80

# what is written on what: on pages, in code, in the header, in the footer
TEXTS = {
    "--md-default-bg-color": [
        "--md-default-fg-color",
        "--md-default-fg-color--light",
        "--md-typeset-a-color",
        "--md-accent-fg-color",
    ],
    "--site-door": ["--md-default-fg-color", "--md-typeset-a-color"],
    "--md-code-bg-color": [
        "--md-code-fg-color",
        "--md-typeset-a-color",
        *(
            f"--md-code-hl-{kind}-color"
            for kind in (
                *("keyword", "string", "number", "function", "constant", "special"),
                *("comment", "operator", "punctuation", "generic", "variable"),
            )
        ),
    ],
    "--md-primary-fg-color": ["--md-primary-bg-color", "--md-primary-bg-color--light"],
    "--md-footer-bg-color": ["--md-footer-fg-color", "--md-footer-fg-color--light"],
    "--md-footer-bg-color--dark": ["--md-footer-fg-color--lighter"],
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_fits_narrow_columns(page: Path) -> None:
    """Tables that a program printed may be wider: they are set smaller."""
    for kind, code in FENCE.findall(page.read_text("utf-8")):
        long = [line for line in code.splitlines() if len(line) > COLUMNS and kind != "text"]
        assert not long, f"lines of more than {COLUMNS} columns"


@pytest.mark.parametrize("scheme", ["default", "slate"])
def test_text_has_contrast(scheme: str) -> None:
    style = (DOCS / "assets" / "site.css").read_text("utf-8")
    rule = re.search(rf'^\[data-md-color-scheme="{scheme}"\] \{{(.*?)^\}}', style, re.M | re.S)
    assert rule
    colors = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6});", rule[1]))
    for ground, texts in TEXTS.items():
        for text in texts:
            assert contrast(colors[ground], colors[text]) >= 4.5, (ground, text)


def test_contrast_is_that_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    # the lightest grey that passes on white, and the next one
    assert contrast("#767676", "#ffffff") > 4.5 > contrast("#777777", "#ffffff")


def test_vendored_files_have_their_licences() -> None:
    for folder in (DOCS / "assets" / "vendor").iterdir():
        assert "MIT" in (folder / "LICENSE").read_text("utf-8")
    # fonts in one format, all of which the style sheet asks for
    katex = DOCS / "assets" / "vendor" / "katex"
    asked = set(re.findall(r"url\(([^)]*)\)", (katex / "katex.min.css").read_text("utf-8")))
    there = {str(path.relative_to(katex)) for path in (katex / "fonts").iterdir()}
    assert asked == there


def contrast(one: str, other: str) -> float:
    """Ratio of two colours' luminances, as WCAG 2 defines it."""
    dark, light = sorted(luminance(color) for color in (one, other))
    return (light + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
