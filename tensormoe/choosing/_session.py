"""Answers to one request after another, as sliders move: what was computed stays."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from tensormoe.choosing._explore import answer_or_errors
from tensormoe.choosing._request import Request
from tensormoe.choosing._rows import Row, row

_KEPT = 512
"""Rows that are kept: those of dozens of requests."""

# what a row does not depend on
_BESIDES = ("factorizations", "bonds", "parts", "selected", "rank")


class Session:
    """:func:`explore` for those who ask often, and for one part of a response at a time.

    A row is computed once for all parts of the same request, and for a request that was asked
    before.

    >>> session = Session()
    >>> asked = {"in_features": 768, "out_features": 768, "experts": 512}
    >>> response = session.explore({**asked, "parts": ["rows"]})
    >>> response["best"]["name"], session.rows
    ('tensor_ring', 10)
    >>> session.explore({**asked, "parts": ["selected"]})["selected"]["factorization"]
    'tensor_ring'
    >>> session.rows
    10
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Row] = OrderedDict()

    @property
    def rows(self) -> int:
        """Rows that are kept."""
        return len(self._kept)

    def explore(self, request: Mapping[str, Any] | Request) -> dict[str, Any]:
        """The response to a request."""
        return answer_or_errors(request, self._row)

    def _row(self, request: Request, name: str) -> Row:
        values = request.to_dict()
        asked = {key: value for key, value in values.items() if key not in _BESIDES}
        asked |= {"name": name, "bonds": values["bonds"].get(name)}
        if name == request.selected and request.rank is not None:
            asked["rank"] = values["rank"]
        key = json.dumps(asked, sort_keys=True)
        found = self._kept.pop(key, None) or row(request, name)
        # the last ones asked for are the last to go; others may ask in between, from other threads
        self._kept[key] = found
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found
