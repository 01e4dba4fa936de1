"""Searches that end before their time: by a callback, a time limit, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import count, pairwise
from typing import Any

import numpy as np
import pytest

from tensormoe import CP, BaseDelta, SharedBasis, TensorRing, Tucker
from tensormoe.decomposition import Decomposition, Progress, Search, _watch, decompose, error_curves
from tensormoe.errors import SpecError
from tests._python import ENVIRONMENT
from tests.decomposition._cases import relative, weights_of

KINDS = [CP(9), TensorRing((2, 3, 3)), Tucker((3, 6, 6)), SharedBasis((2, 3)), BaseDelta(3)]


@pytest.fixture
def stack(rng: np.random.Generator) -> np.ndarray:
    """Experts that no small factors are close to, with modes that cores are made of."""
    return rng.standard_normal((6, 60, 50)) + rng.standard_normal((1, 60, 50))


class Ends:
    """A callback that ends a decomposition at a call: by True, or what it raises."""

    def __init__(self, call: int, how: Any = True) -> None:
        self.call, self.how = call, how
        self.seen: list[Progress] = []

    def __call__(self, progress: Progress) -> bool:
        self.seen.append(progress)
        if len(self.seen) != self.call:
            return False
        if self.how is True:
            return True
        raise self.how


def true(found: Decomposition, stack: np.ndarray) -> float:
    """The error, by other code; the report must say the same."""
    error = relative(weights_of(found.spec, found.factors), stack)
    assert found.report.error == pytest.approx(error, rel=1e-9)
    return error


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("how", [True, KeyboardInterrupt], ids=["stopped", "interrupted"])
def test_the_best_so_far_is_what_fewer_sweeps_find(kind: Any, how: Any, stack: np.ndarray) -> None:
    """At every sweep of a search; then factors are those of a search that is so long."""
    free = Search(starts=2, sweeps=4, polish=2, tolerance=0.0)
    whole = Ends(0, how)
    wanted = decompose(stack, kind, search=free, callback=whole)
    assert wanted.report.to_dict() | {"seconds": 0} == (
        decompose(stack, kind, search=free).report.to_dict() | {"seconds": 0}
    )
    assert [each.sweep for each in whole.seen] == list(range(1, len(whole.seen) + 1))
    assert {each.factorization for each in whole.seen} == {kind}
    errors = []
    for sweep in range(1, len(whole.seen) + 1):
        ends = Ends(sweep, how)
        found = decompose(stack, kind, search=free, callback=ends)
        assert len(ends.seen) == sweep
        assert found.report.ended == ("stopped" if how is True else "interrupted")
        assert (found.report.svd_error is None) == (how is not True)
        errors.append(true(found, stack))
        assert errors[-1] <= ends.seen[-1].error * 1.01
        assert found.report.sweeps == len(found.report.history)
        assert found.report.history[-1] == pytest.approx(errors[-1], rel=5e-3)
    assert all(after <= before * 1.002 for before, after in pairwise(errors))
    assert errors[-1] == pytest.approx(wanted.report.error, rel=1e-9)


def test_factors_of_a_search_that_is_so_long(stack: np.ndarray) -> None:
    for sweeps in (1, 3, 7):
        ends = decompose(
            stack,
            CP(9),
            search=Search(starts=1, polish=0, tolerance=0.0),
            callback=Ends(sweeps, True),
        )
        search = Search(starts=1, sweeps=sweeps, polish=0, tolerance=0.0)
        wanted = decompose(stack, CP(9), search=search)
        for name, array in wanted.factors.items():
            np.testing.assert_allclose(ends.factors[name], array, rtol=1e-9, atol=1e-9)


def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by a second at each reading."""
    ticks = count()
    monkeypatch.setattr(_watch, "perf_counter", lambda: float(next(ticks)))


@pytest.mark.parametrize("seconds", [1, 2.5, 6])
def test_a_time_limit_is_kept_to_within_one_sweep(
    seconds: float, stack: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Progress] = []
    search = Search(seconds=seconds, tolerance=0.0)
    # the clock stands at 0 where the search starts, and is read once per sweep
    ticking(monkeypatch)
    found = decompose(stack, CP(9), search=search, callback=lambda each: seen.append(each))
    assert found.report.ended == "time"
    assert [each.seconds for each in seen] == list(range(1, len(seen) + 1))
    assert seen[-1].seconds >= seconds > seen[-1].seconds - 1
    assert true(found, stack) < 1


def test_without_a_limit_all_is_as_before(stack: np.ndarray) -> None:
    plain = decompose(stack, TensorRing((2, 3, 3)))
    for search in (Search(seconds=1e9), None):
        found = decompose(stack, TensorRing((2, 3, 3)), search=search, callback=lambda _: None)
        assert found.report.ended == plain.report.ended
        assert found.report.history == plain.report.history
        for name, array in plain.factors.items():
            np.testing.assert_array_equal(found.factors[name], array)


@pytest.mark.parametrize("how", [True, KeyboardInterrupt], ids=["stopped", "interrupted"])
def test_budgets_end_with_the_best_that_was_tried(how: Any, stack: np.ndarray) -> None:
    whole = Ends(0, how)
    wanted = decompose(stack, "tensor_ring", budget=0.2, callback=whole)
    tried = list(dict.fromkeys(each.factorization for each in whole.seen))
    assert len(tried) > 2
    first = [next(k for k, p in enumerate(whole.seen) if p.factorization == kind) for kind in tried]
    # in the third sweep of the first trial, of the second, and of the long search
    calls = (3, first[1] + 3, len(whole.seen) - whole.seen[-1].sweep + 3)
    for call in calls:
        ends = Ends(call, how)
        found = decompose(stack, "tensor_ring", budget=0.2, callback=ends)
        assert len(ends.seen) == call
        least = min(each.error for each in ends.seen)
        assert true(found, stack) == pytest.approx(least, rel=5e-3)
    assert found.spec == wanted.spec
    assert wanted.report.error <= found.report.error


def test_tolerances_end_with_the_smallest_that_was_reached(stack: np.ndarray) -> None:
    stack = stack[:, :14, :10]
    whole = Ends(0, True)
    wanted = decompose(stack, "tensor_train", tolerance=0.5, callback=whole)
    assert wanted.report.error <= 0.5
    assert wanted.report.ended == decompose(stack, wanted.spec.factorization).report.ended
    sizes = []
    for sweeps in (1, len(whole.seen) // 3, 2 * len(whole.seen) // 3, len(whole.seen)):
        ends = Ends(sweeps)
        found = decompose(stack, "tensor_train", tolerance=0.5, callback=ends)
        assert found.report.ended == "stopped"
        true(found, stack)
        sizes.append(found.report.parameters)
        # what was being tried last may be better than it has to be
        assert found.report.error <= 0.5 or sweeps == 1
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] >= wanted.report.parameters


@pytest.mark.parametrize("where", ["fit", "second"])
def test_with_nothing_to_return_it_is_raised(
    where: str, stack: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    if where == "fit":
        from tensormoe.decomposition import _fit

        monkeypatch.setattr(_fit, "compress", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decompose(stack, CP(9))
        with pytest.raises(KeyboardInterrupt):
            error_curves(stack, [CP(9)])
        return
    from tensormoe.decomposition import _decompose

    monkeypatch.setattr(_decompose, "residual_norms", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decompose(stack, CP(9), callback=Ends(4, KeyboardInterrupt))


def test_interrupted_between_sweeps(stack: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes in the middle of something else than a sweep: nothing is lost."""
    from tensormoe.decomposition import _fit

    expand = _fit.expand
    calls = count()

    def once(*given: Any) -> Any:
        if next(calls) == 0:
            raise KeyboardInterrupt
        return expand(*given)

    monkeypatch.setattr(_fit, "expand", once)
    search = Search(starts=1, sweeps=30)
    found = decompose(stack, CP(9), search=search)
    assert found.report.ended == "interrupted"
    wanted = decompose(stack, CP(9), search=Search(starts=1, sweeps=30, polish=0))
    assert true(found, stack) == pytest.approx(wanted.report.error, rel=1e-9)


def test_interrupted_comparisons_are_left_out(
    stack: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(np.linalg, "eigvalsh", interrupted)
    found = decompose(stack, CP(9))
    assert found.report.ended == "interrupted"
    assert found.report.svd_error is None
    true(found, stack)


def test_what_a_callback_raises_comes_through(stack: np.ndarray) -> None:
    with pytest.raises(ZeroDivisionError):
        decompose(stack, CP(9), callback=Ends(2, ZeroDivisionError))
    with pytest.raises(SpecError, match="callback must return True"):
        decompose(stack, CP(9), callback=lambda _: "stop")  # type: ignore[arg-type,return-value]


def test_curves_end_with_the_points_so_far(stack: np.ndarray) -> None:
    whole = Ends(0)
    wanted = error_curves(stack, [CP(2), CP(9), Tucker((3, 6, 6))], callback=whole)
    assert [len(curve.points) for curve in wanted] == [2, 1]
    second = next(k for k, each in enumerate(whole.seen) if each.factorization == CP(9))
    with pytest.warns(UserWarning, match="interrupted: points or their SVDs"):
        (curve,) = error_curves(
            stack, [CP(2), CP(9), Tucker((3, 6, 6))], callback=Ends(second + 4, KeyboardInterrupt)
        )
    assert curve.points[0].report.error == wanted[0].points[0].report.error
    assert [each.report.ended for each in curve.points][1] == "interrupted"
    # True ends one point only
    curves = error_curves(stack, [CP(2), CP(9), Tucker((3, 6, 6))], callback=Ends(second + 4))
    assert [len(curve.points) for curve in curves] == [2, 1]
    assert [each.report.ended for each in curves[0].points][1] == "stopped"


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), True, "1"])
def test_limits_that_cannot_be(seconds: Any) -> None:
    with pytest.raises(SpecError, match="seconds must be a positive number"):
        Search(seconds=seconds)


SCRIPT = """
import signal
import numpy as np
from tensormoe import TensorRing
from tensormoe.decomposition import Search, decompose

# what a shell runs in the background ignores the signal, and so do its children
signal.signal(signal.SIGINT, signal.default_int_handler)
weights = np.random.default_rng(0).standard_normal((48, 256, 384), dtype="float32")
search = Search(starts=1, sweeps=10**6, tolerance=0.0)
shown = lambda each: print(each.sweep, f"{each.error:.4f}", flush=True)
found = decompose(weights, TensorRing((4, 4, 16)), search=search, callback=shown)
print(found.report.ended, f"{found.report.error:.4f}", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c() -> None:
    """A real SIGINT, in the middle of a long search."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().split() for _ in range(20)]
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [int(sweep) for sweep, _ in lines] == list(range(1, 21))
    ended, error = rest.splitlines()[-1].split()
    assert ended == "interrupted"
    assert float(error) <= float(lines[-1][1]) * 1.001
