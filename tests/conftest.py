"""Hypothesis profiles, and a seed for each test that is printed when the test fails.

Loaded where no array library is installed too: nothing here may import one at the top.
"""

from __future__ import annotations

import gc
import os
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import numpy as np

# A first call plans and a loaded machine stalls: time limits would make tests flaky.
_COMMON = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", _COMMON)
settings.register_profile("ci", _COMMON, derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))

_SEED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="varies the seed of every test")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Libraries and tests stay until the end: the garbage collector need not look at them again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()
        # compilers make many objects: a tenth of their time would be spent on looking at these
        gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The same for a test from run to run, another one for each test."""
    offset = request.config.getoption("--seed")
    value = zlib.crc32(f"{request.node.nodeid}{offset or ''}".encode())
    request.node.stash[_SEED] = value
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    import numpy as np

    return np.random.default_rng(seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed and _SEED in item.stash:
        report.sections.append(("seed", f"np.random.default_rng({item.stash[_SEED]})"))
    return report
