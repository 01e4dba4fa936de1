"""Processes for the tests of layers that are spread over several."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.torch._ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Runs functions in two processes with a process group."""
    pair = Ranks()
    yield pair
    pair.stop()
