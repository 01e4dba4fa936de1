"""Array libraries for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.editing._libraries import every_library


@pytest.fixture(scope="module")
def libraries() -> Iterator[dict[str, Any]]:
    with every_library() as found:
        yield found
