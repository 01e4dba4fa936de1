"""Explorations that the browser opens, and that tests compare with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tensormoe.analysis import (
    Exploration,
    Images,
    Table,
    Texts,
    Tokens,
    explore,
    explore_coefficients,
)
from tensormoe_numpy import MuMoE

LINEAR, LEVELS, TOKENS, HOSTILE, TABLE, BARE, MANY = (
    *("linear", "levels", "tokens", "hostile", "table", "bare", "many"),
)
ATTACK = "</script><img src=x onerror='window.broken=1'>\u2028<!--%%DATA%%\ud800"


def sparse(rng: np.random.Generator, rows: int, experts: int, chosen: int = 3) -> np.ndarray:
    """Random coefficients that sum to one, different for each row."""
    made = np.zeros((rows, experts), "float32")
    for _ in range(chosen):
        made[np.arange(rows), rng.integers(0, experts, rows)] += rng.random(rows, "float32") + 0.1
    return made / made.sum(axis=1, keepdims=True)


def linear(rows: int = 200, experts: int = 16, seed: int = 0) -> Exploration:
    """Outputs are logits, inputs images; the last expert is never used."""
    rng = np.random.default_rng(seed)
    layer = MuMoE(16, 5, experts, rank=6, gate=None, seed=0)
    x = rng.standard_normal((rows, 16)).astype("float32")
    coefficients = np.pad(sparse(rng, rows, experts - 1), ((0, 0), (0, 1)))
    labels = layer(x, coefficients).argmax(axis=1)
    pictures = Images(rng.integers(0, 256, (rows, 8, 8)).astype("uint8"))
    names = ["ant", "bee", "cat", "dog", "elk"]
    return explore(
        layer,
        x,
        labels,
        coefficients=coefficients,
        head="identity",
        examples=pictures,
        class_names=names,
        title="Animals",
    )


def levels() -> Exploration:
    """Two levels, and a head that is not linear."""
    rng = np.random.default_rng(1)
    layer = MuMoE(12, 8, (6, 4), rank=6, gate="entmax", seed=2)
    layer.parameters["gate.projection_0"][:] = rng.standard_normal((12, 6)) * 2
    layer.parameters["gate.projection_1"][:] = rng.standard_normal((12, 4)) * 2
    x = rng.standard_normal((120, 12)).astype("float32")
    out = rng.standard_normal((8, 3)).astype("float32")

    def head(outputs: np.ndarray) -> np.ndarray:
        return np.tanh(3 * outputs) @ out

    labels = rng.integers(0, 3, 120)
    texts = Texts([f"The text with number {row}." for row in range(120)])
    return explore(layer, x, labels, head=head, examples=texts, classes=3, title="Two levels")


def tokens() -> Exploration:
    """Tokens, without classes."""
    rng = np.random.default_rng(2)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "dogs", "that", "ran"]
    texts = [[f" {words[k]}" for k in rng.integers(0, len(words), 30)] for _ in range(8)]
    return explore_coefficients(
        sparse(rng, 240, 12, 2).reshape(8, 30, 12), examples=Tokens(texts, 10), title="Words"
    )


def hostile() -> Exploration:
    """Names, texts and titles that try to become markup."""
    rng = np.random.default_rng(3)
    return explore_coefficients(
        sparse(rng, 40, 4),
        rng.integers(0, 2, 40),
        examples=Table([[ATTACK, 1.0]] * 40, [ATTACK, "width"]),
        class_names=[ATTACK, "javascript:alert(1)"],
        title=ATTACK,
    )


def table() -> Exploration:
    """Rows of a table; coefficients that do not sum to one."""
    rng = np.random.default_rng(4)
    rows = rng.standard_normal((60, 3)).round(3)
    return explore_coefficients(
        2 * sparse(rng, 60, 9),
        rng.integers(0, 2, 60),
        examples=Table(rows, ["width", "height", "weight"]),
        class_names=["small", "large"],
    )


def bare() -> Exploration:
    """Nothing but coefficients."""
    return explore_coefficients(sparse(np.random.default_rng(5), 50, 6))


def many(experts: int = 4096, rows: int = 8192) -> Exploration:
    """As many experts as a page must bear."""
    rng = np.random.default_rng(6)
    layer = MuMoE(32, 10, experts, rank=16, gate=None, seed=0)
    x = rng.standard_normal((rows, 32)).astype("float32")
    coefficients = sparse(rng, rows, experts, 8)
    pictures = Images(rng.integers(0, 256, (rows, 14, 14)).astype("uint8"))
    return explore(
        layer,
        x,
        layer(x, coefficients).argmax(axis=1),
        coefficients=coefficients,
        head="identity",
        examples=pictures,
    )


def write_pages(folder: Path) -> dict[str, Path]:
    """Every page, by name."""
    made = {
        **{LINEAR: linear, LEVELS: levels, TOKENS: tokens, HOSTILE: hostile},
        **{TABLE: table, BARE: bare, MANY: many},
    }
    paths = {}
    for name, found in made.items():
        paths[name] = folder / f"{name}.html"
        found().save(paths[name])
    return paths
