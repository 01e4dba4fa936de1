"""Processes for the tests of layers that are spread over several."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.torch._ranks import Ranks

PROCESSES = tuple(map(int, os.environ.get("TENSORMOE_TEST_PROCESSES", "2").split(",")))
"""Numbers of processes that layers are cut over; ``make test-distributed`` asks for more."""


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Runs functions in two processes with a process group."""
    pair = Ranks()
    yield pair
    pair.stop()


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    """The same in four processes."""
    processes = Ranks(4)
    yield processes
    processes.stop()


@pytest.fixture(scope="session", params=PROCESSES, ids="{} processes".format)
def devices(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """The same in as many processes as layers are cut over."""
    if request.param == 2:
        # one pair is enough
        yield request.getfixturevalue("ranks")
        return
    processes = Ranks(request.param)
    yield processes
    processes.stop()
