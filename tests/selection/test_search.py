"""Parts of the search, against their plain definitions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormoe.factorizations import FACTORIZATIONS
from tensormoe.selection._family import Family
from tensormoe.selection._search import _around, _Corners, _first, _monotone, _next

PAIRS = st.tuples(st.integers(-9, 9), st.integers(-9, 9))


@pytest.mark.parametrize("name", FACTORIZATIONS)
@pytest.mark.parametrize("experts", [1, 7, (4, 8), (3, 4, 5)])
def test_figures_are_those_of_the_layer(name: str, experts: int | tuple[int, ...]) -> None:
    family = Family(name, 40, 24, experts, True, None)
    for outer in (1, 2, 9, 33) if family.symbols == 2 else (1,):
        for inner in (1, 3, 17) if family.symbols else (1,):
            spec = family.spec((outer, inner))
            assert family.figures((outer, inner)) == (spec.expert_rank, spec.expert_span)


@given(st.lists(PAIRS), PAIRS)
def test_corners_cover_what_some_pair_covers(
    pairs: list[tuple[int, int]], asked: tuple[int, int]
) -> None:
    corners = _Corners()
    for pair in pairs:
        corners.add(pair)
    covered = any(asked[0] <= one and asked[1] <= two for one, two in pairs)
    assert corners.cover(asked) == covered


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 45), st.integers(1, 60))
def test_the_smallest_size_that_passes(low: int, more: int, start: int, guess: int) -> None:
    high = low + more
    for first in (low + start, low):

        def passes(size: int, first: int = first) -> bool:
            assert 1 <= size <= max(high, 1)
            return size >= first

        expected = next((size for size in range(low, high + 1) if passes(size)), high + 1)
        assert _first(passes, low, high) == expected
        assert _next(passes, low, high) == expected
        if low == 1:
            assert _around(passes, guess, high) == expected


def test_few_are_asked_where_the_answer_is_near() -> None:
    asked: list[int] = []

    def passes(size: int) -> bool:
        asked.append(size)
        return size >= 502

    assert _next(passes, 500, 100_000) == 502
    assert _around(passes, 505, 100_000) == 502
    assert len(asked) <= 12


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9))), st.integers(2, 18))
def test_told_as_asked(sizes: list[tuple[int, int]], limit: int) -> None:
    asked: list[tuple[int, int]] = []

    def fits(pair: tuple[int, int]) -> bool:
        asked.append(pair)
        return sum(pair) <= limit

    told = _monotone(fits)
    assert [told(pair) for pair in sizes] == [sum(pair) <= limit for pair in sizes]
    assert len(asked) == len({*asked})
