"""The pace of a search, and why it ends: sweeps that return scripted errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensormoe import CP, Tucker
from tensormoe.decomposition import Search, _search, decompose
from tensormoe.decomposition._search import ENDED, advance, worst
from tests.decomposition.test_starts import Claims

GIVEN = {"a": 1.0}


def search(
    monkeypatch: pytest.MonkeyPatch, said: Any, count: int | None = None, **options: Any
) -> tuple[Any, Any]:
    """Run a search whose sweeps claim these errors, or (claimed, true) ones."""
    pairs = tuple(each if isinstance(each, tuple) else (each, each) for each in said)
    problem: Any = Claims(pairs)
    monkeypatch.setattr(_search, "sweep", problem.sweep)
    settings = {"tolerance": 1e-3, "known": 1.0} | options
    return advance(problem, GIVEN, count or len(said), **settings), problem


def test_sweeps_reach_ahead_further_as_long_as_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [0.9, 0.8, 0.7, 0.6]
    found, problem = search(monkeypatch, errors)
    starts = [start for start, _ in problem.seen]
    # the first two have no step behind them; each that is kept makes the next one a tenth longer
    wanted = [1.0, 0.9, 0.8 + 0.5 * 1.1**2 * (0.8 - 0.9), 0.7 + 0.5 * 1.1**3 * (0.7 - 0.8)]
    assert starts == pytest.approx(wanted)
    assert found.errors == tuple(errors)
    assert found.ended == "sweeps"


def test_the_reach_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [0.9**turn for turn in range(1, 41)]
    _, problem = search(monkeypatch, errors)
    start, _ = problem.seen[-1]
    assert start == pytest.approx(errors[-2] + 2.0 * (errors[-2] - errors[-3]))


def test_a_sweep_that_fails_is_taken_back_and_the_reach_shrinks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, problem = search(monkeypatch, [0.9, 0.8, 0.95, 0.7, 0.6, 0.5])
    starts = [start for start, _ in problem.seen]
    # after the third, a plain sweep from the second; then one that reaches less far
    assert starts[3] == 0.8
    reach = 0.5 * 1.1**2 / 1.5 * 1.1
    assert starts[4] == pytest.approx(0.7 + reach * (0.7 - 0.8))
    assert found.errors == (0.9, 0.8, 0.7, 0.6, 0.5)


def test_plain_sweeps_that_fail_are_damped(monkeypatch: pytest.MonkeyPatch) -> None:
    _, problem = search(monkeypatch, [1.01, 1.01, 0.9, 0.8])
    damping = [each for _, each in problem.seen]
    assert damping == pytest.approx([0.0, 1e-6, 1e-5, 1e-5 / 3])


def test_a_search_ends_when_sweeps_in_a_row_gain_too_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = [0.9, *(0.9 * (1 - 1e-4) ** turn for turn in range(1, 9))]
    found, problem = search(monkeypatch, said)
    assert found.ended == "converged"
    assert len(problem.seen) == 6
    # one that gains begins a new row
    said = [0.9, 0.89999, 0.89998, 0.8, 0.79999, 0.79998, 0.79997, 0.79996, 0.79995, 0.79994]
    found, problem = search(monkeypatch, said)
    assert found.ended == "converged"
    assert len(problem.seen) == 9
    found, problem = search(monkeypatch, said, patience=2)
    assert len(problem.seen) == 3


def test_what_rounding_hides_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [1e-3, 1e-6, 5e-10, *([5e-10] * 6)]
    found, problem = search(monkeypatch, said)
    assert len(problem.seen) == 5
    assert found.ended == "converged"


def test_errors_close_to_rounding_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that a sweep claims there is worth nothing."""
    found, _ = search(monkeypatch, [(0.0, 0.5), (0.0, 0.4)])
    assert found.errors == (0.5, 0.4)


def test_a_search_that_does_not_follow_its_claims_is_stalled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lies = [(0.9 - 0.1 * turn, 2.0) for turn in range(5)]
    worse = [(1.5, 1.5)] * 5
    found, _ = search(monkeypatch, [*lies, *worse])
    assert found.factors is GIVEN
    assert found.ended == "stalled"
    # plain sweeps that end far above what was known
    found, _ = search(monkeypatch, worse)
    assert found.ended == "stalled"
    # a gain makes up for it
    found, _ = search(monkeypatch, [*worse[:3], 0.9, *([0.8999] * 6)])
    assert found.ended == "converged"
    # and so does an error that is rounding
    found, _ = search(monkeypatch, [*worse], known=5e-9)
    assert found.ended == "converged"


def test_after_a_surprise_what_is_sure_goes_on_with_care(monkeypatch: pytest.MonkeyPatch) -> None:
    lies = [(0.6 - 0.1 * turn, 2.0) for turn in range(5)]
    found, problem = search(monkeypatch, [0.9, 0.85, 0.8, 0.7, 0.65, *lies, 0.6, 0.5])
    # five sweeps that are true, five that are not, and then from the fifth
    assert problem.seen[10] == (0.65, pytest.approx(1e-4))
    assert found.errors == (0.9, 0.85, 0.8, 0.7, 0.65, 0.6, 0.5)


def test_the_last_factors_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = search(monkeypatch, [0.9, (0.8, 0.95)])
    assert found.factors == {"a": 0.95}
    assert found.errors == (0.9, 0.95)


def test_reasons_are_in_order() -> None:
    assert worst("converged", "sweeps") == "sweeps"
    assert worst("stalled", "sweeps", "converged") == "stalled"
    assert [worst(*ENDED[: k + 1]) for k in range(len(ENDED))] == list(ENDED)


def test_reports_say_why_a_search_ended(rng: np.random.Generator) -> None:
    weights = rng.standard_normal((6, 14, 12))
    few = Search(starts=1, sweeps=2, polish=0)
    assert decompose(weights, CP(5), search=few, compare=False).report.ended == "sweeps"
    long = Search(starts=1, sweeps=500)
    report = decompose(weights, CP(5), search=long, compare=False).report
    assert report.ended == "converged"
    assert report.to_dict()["ended"] == "converged"
    zero = decompose(0.0 * weights, Tucker((2, 3, 3)), compare=False).report
    assert zero.ended == "converged"
