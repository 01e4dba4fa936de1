"""The command line: choose ranks, look at plans, measure this machine, compress and explore models.

``tensormoe --help`` lists the commands; ``--help`` after any of them says more. ``--json`` prints
one JSON object for programs, ``--plot`` writes a picture. Errors are a line each on standard error,
and exit status 2.
"""

from __future__ import annotations

from tensormoe.cli._main import main

__all__ = ["main"]
