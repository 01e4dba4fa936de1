"""The time that several machines take for stacks of unequal sizes."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensormoe.cli import main
from tensormoe.compression import Compression, CompressionPlan, GroupPlan, plan_compression
from tensormoe.errors import SpecError
from tests._compress_models import PATTERN, experts, save_shards


def planned(*seconds: float) -> CompressionPlan:
    nothing: Any = None
    groups = tuple(GroupPlan(nothing, (), None, 0, each) for each in seconds)
    return CompressionPlan(nothing, nothing, groups)


@pytest.mark.parametrize(
    ("machines", "seconds"),
    # the longest first: 7 6, then 5 to the second, 4 to the first, 3 to either
    [(1, 25.0), (2, 14.0), (3, 9.0), (4, 7.0), (5, 7.0), (64, 7.0)],
)
def test_the_arithmetic(machines: int, seconds: float) -> None:
    assert planned(3, 6, 7, 4, 5).seconds_on(machines) == seconds


def test_graham_s_bound(rng: np.random.Generator) -> None:
    """Never better than the best schedule, and never more than 4/3 - 1/(3 m) of it."""
    for _ in range(30):
        times = rng.integers(1, 20, size=6).tolist()
        for machines in (2, 3):
            best = min(
                max(
                    sum(t for t, m in zip(times, where, strict=True) if m == k)
                    for k in range(machines)
                )
                for where in product(range(machines), repeat=len(times))
            )
            found = planned(*times).seconds_on(machines)
            assert best <= found <= (4 / 3 - 1 / (3 * machines)) * best


@pytest.mark.parametrize("machines", [0, -1, 2.0, True])
def test_machines_that_cannot_be(machines: Any) -> None:
    with pytest.raises(SpecError, match="machines must be a positive integer"):
        planned(1.0).seconds_on(machines)


def test_a_dry_run_predicts_clusters(
    tmp_path: Path,
    rng: np.random.Generator,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    layers = [experts(rng, rows=6 + layer, layer=layer) for layer in range(9)]
    model = save_shards(tmp_path / "model", *layers)
    words = ["compress", str(model), "--experts", PATTERN[0], "--budget", "50%", "--dry-run"]
    # nobody is asked at that address
    words += ["--scheduler", "tcp://127.0.0.1:1"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = plan_compression(model, Compression("tensor_ring", budget=0.5, experts=PATTERN))
    assert found["machines"] == {str(each): plan.seconds_on(each) for each in (1, 8, 64)}
    assert found["machines"]["1"] == pytest.approx(found["seconds"])
    times = sorted(each["seconds"] for each in found["groups"])
    # nine groups: one of eight machines takes the two shortest, or the longest takes longer
    assert found["machines"]["8"] == pytest.approx(max(times[0] + times[1], times[-1]))
    assert found["machines"]["64"] == times[-1]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "in a cluster: " in shown
    for text in (" on 1,", " on 8,", " on 64\n"):
        assert text in shown
