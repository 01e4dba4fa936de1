"""Choosing before training: one function from a question to all of its answers, as plain values.

The command line, a local server and a page in a browser ask :func:`explore`, which needs no array
library.
"""

from __future__ import annotations

from tensormoe.choosing._best import Best as Best
from tensormoe.choosing._explore import answer as answer
from tensormoe.choosing._explore import explore as explore
from tensormoe.choosing._request import Request as Request
from tensormoe.choosing._request import parse_request as parse_request
from tensormoe.choosing._schema import request_schema as request_schema
from tensormoe.choosing._schema import response_schema as response_schema
from tensormoe.choosing._session import Session as Session

__all__ = [
    "Best",
    "Request",
    "Session",
    "answer",
    "explore",
    "parse_request",
    "request_schema",
    "response_schema",
]
