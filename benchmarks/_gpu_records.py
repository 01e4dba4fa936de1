"""Results of a part of the GPU report, kept line by line: what is measured stays if it is stopped.

Standard library alone: the report itself runs without any array library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

T = TypeVar("T")
Cells = dict[str, Any]

# the same failure again and again: a device that has stopped, or a library that cannot start
MOST_FAILURES = 3
OUT_OF_MEMORY = ("out of memory", "RESOURCE_EXHAUSTED", "not enough memory")
NO_MEMORY = "does not fit in memory"


@dataclass
class Found:
    """Results of one part.

    Attributes:
        facts: by name.
        tables: rows by title of a table, each from column to cell.
        failed: what failed, and why.
        left_out: what was not run, and why.
        done: whether the part came to its end.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[Cells]] = field(default_factory=dict)
    failed: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    done: bool = False


def read(path: Path) -> Found:
    """The lines of a file, which may be missing or end in the middle of one."""
    found = Found()
    planned: list[str] = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            kind, *values = json.loads(line)
        except ValueError:
            continue
        if kind == "fact":
            found.facts[values[0]] = values[1]
        elif kind == "row":
            found.tables.setdefault(values[0], []).append(values[1])
        elif kind == "failed":
            found.failed.append((values[0], values[1]))
        elif kind == "left out":
            found.left_out.append((values[0], values[1]))
        elif kind == "planned":
            planned += values[0]
        elif kind == "ended":
            planned.remove(values[0])
        else:
            found.done = True
    found.left_out += [(what, "its part had stopped") for what in planned]
    return found


class Recorder:
    """Writes the results of a part.

    Args:
        path: of the file, which is added to.
        seconds: until nothing more is begun.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path = path
        self.end = monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - monotonic()

    def fact(self, name: str, value: Any) -> None:
        """One fact."""
        self._write("fact", name, value)

    def row(self, table: str, cells: Cells) -> None:
        """One row of a table."""
        self._write("row", table, cells)

    def failed(self, what: str, error: BaseException | str) -> str:
        """Something that failed, or does not fit in memory; the line that says which."""
        text = error if isinstance(error, str) else reason(error)
        if any(each in text for each in OUT_OF_MEMORY):
            self.left_out(what, NO_MEMORY)
            return NO_MEMORY
        self._write("failed", what, text)
        return text

    def left_out(self, what: str, why: str) -> None:
        """Something that was not run."""
        self._write("left out", what, why)

    def done(self) -> None:
        """The end."""
        self._write("done")

    def each(
        self, items: Iterable[T], run: Callable[[T], object], clean: Callable[[], object]
    ) -> None:
        """Run items while there is time for one more that takes as long as they do on average.

        Args:
            items: in order of importance; their texts say in the report what was left out.
            run: one item; what it raises is recorded.
            clean: is called behind each.
        """
        items = list(items)
        self._write("planned", [str(item) for item in items])
        begin, ran, again, last = monotonic(), 0, 0, ""
        for item in items:
            if ran and self.left < (monotonic() - begin) / ran:
                self.left_out(str(item), "no time left")
            elif again == MOST_FAILURES:
                self.left_out(str(item), f"{again} in succession had failed: {last}")
            else:
                ran += 1
                text = self.tried(str(item), partial(run, item))
                # too little memory for one is enough for another
                text = "" if text == NO_MEMORY else text
                again = again + 1 if text and text == last else int(bool(text))
                last = text
                clean()
            self._write("ended", str(item))

    def tried(self, what: str, run: Callable[[], object]) -> str:
        """Run something, and record the line that says why it failed; empty if it did not."""
        try:
            run()
        except Exception as error:
            return self.failed(what, error)
        return ""

    def _write(self, *values: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def reason(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
