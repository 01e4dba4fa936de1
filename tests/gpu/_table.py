"""What became of each library's tests, as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

GROUPS = ("device", "primitives", "gates", "mixtures", "layers")


@dataclass
class Results:
    """What became of a library's tests.

    Attributes:
        code: exit status of pytest.
        groups: a count of outcomes for each group.
        device: the device that the library names.
        version: the library's.
        failures: names of the tests that failed.
        unfinished: whether the tests were stopped at a time limit.
    """

    code: int
    groups: dict[str, Counter[str]] = field(default_factory=dict)
    device: str = "?"
    version: str = "?"
    failures: list[str] = field(default_factory=list)
    unfinished: bool = False

    @property
    def fine(self) -> bool:
        """Whether every group ran, and nothing failed."""
        ran = all(self.groups.get(group, Counter())["passed"] for group in GROUPS)
        return self.code == 0 and ran and not self.unfinished


def read(report: Path, code: int, unfinished: bool = False) -> Results:
    """Count the outcomes in a report of pytest's.

    Args:
        report: its path.
        code: exit status of pytest.
        unfinished: whether pytest was interrupted. The last test then has no failure in the report,
            but no end either, and is not counted.
    """
    results = Results(code, unfinished=unfinished)
    elements = list(ElementTree.parse(report).iter())
    last = [each for each in elements if each.tag == "testcase"][-1:]
    for each in elements:
        if unfinished and [each] == last and not len(each):
            continue
        if each.tag == "property" and each.get("name") in ("device", "version"):
            setattr(results, each.get("name", ""), each.get("value"))
        if each.tag == "testcase":
            outcome = "passed"
            for child in each:
                outcome = {"skipped": "skipped", "failure": "failed", "error": "failed"}.get(
                    child.tag, outcome
                )
            count = results.groups.setdefault(group_of(each), Counter())
            count[outcome] += 1
            if outcome == "failed":
                results.failures.append(f"{each.get('classname')}::{each.get('name')}")
    return results


def group_of(case: ElementTree.Element) -> str:
    """The column of the table that a test belongs to."""
    from tensormoe.testing import BackendContract

    name = case.get("name", "").partition("[")[0]
    if name == "test_the_device":
        return "device"
    if case.get("classname", "").rpartition(".")[2] not in ("TestContract", "TestCupy"):
        return "layers"
    if name in vars(BackendContract):
        return "gates" if "gates" in name or "routing" in name else "primitives"
    return "mixtures"


def table(results: dict[str, Results]) -> str:
    """Libraries by groups: passed, failed and skipped tests."""
    rows = [("library", *GROUPS, "device")]
    for library, found in results.items():
        cells = [cell(found.groups.get(group, Counter())) for group in GROUPS]
        rows.append((f"{library} {found.version}", *cells, found.device))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    stopped = [f"{name}: stopped at its time limit" for name in results if results[name].unfinished]
    return "\n".join(["", *lines, "", "passed, failed (✗) and skipped (○) tests", *stopped])


def cell(count: Counter[str]) -> str:
    """How many passed, failed and were skipped, as text."""
    if not count:
        return "none ran"
    marks = {"passed": "", "failed": " ✗", "skipped": " ○"}
    listed = [f"{count[name]}{mark}" for name, mark in marks.items() if count[name]]
    return ", ".join(listed)
