"""Public functions with one invalid argument: clear errors, no crash, no hang.

A call runs in a process of its own kind, which is started anew where it ends or hangs.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.fuzz._junk import JUNK

ROOT = Path(__file__).resolve().parents[2]
# beyond what the process itself gives a call: it may be stuck where no signal reaches
SECONDS = 30


@dataclass(frozen=True, eq=False)
class Door:
    """A public function or method.

    Args:
        name: for messages.
        call: takes the arguments by name.
        arguments: makes arguments that fit, anew for each call.
    """

    name: str
    call: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]


@cache
def table() -> tuple[tuple[Door, str, str], ...]:
    """One row per call: the function, the argument that is replaced, and the invalid value."""
    from tests.fuzz._doors_core import doors as core
    from tests.fuzz._doors_explorer import doors as explorer
    from tests.fuzz._doors_frameworks import doors as frameworks

    return tuple(
        (door, argument, junk)
        for door in (*core(), *explorer(), *frameworks())
        for argument in door.arguments()
        for junk in JUNK
    )


def count() -> int:
    """Calls in all."""
    return len(table())


def at(index: int) -> tuple[Door, str, Any]:
    """The call of a number: the function, the argument's name and its value."""
    door, argument, junk = table()[index]
    return door, argument, JUNK[junk]()


def run(index: int) -> bool:
    """Make the call of a number in the worker.

    Raises:
        AssertionError: it does not end as it should.
    """
    door, argument, junk = table()[index]
    wrong = _WORKER.ask(index)
    assert wrong is None, f"{door.name}({argument}={junk}): {wrong}"
    return True


class _Worker:
    """The process that makes the calls."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, index: int) -> str | None:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz._worker"],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"%d\n" % index)
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], SECONDS)
        answer = process.stdout.readline() if ready else b""
        if answer:
            found: str | None = json.loads(answer)
            return found
        self.close()
        return f"the interpreter ended ({process.returncode})" if ready else "hangs"

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


_WORKER = _Worker()
atexit.register(_WORKER.close)
