"""The contract suites of a GPU report: those of ``make test-gpu``, each with a time limit."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from _gpu_records import Recorder

RUNNER = Path(__file__).resolve().parents[1] / "tests" / "gpu"
TABLE = "Contract suites"
# names of tests that the report repeats; all are in the log
MOST_NAMES = 20


def suite(recorder: Recorder, library: str, device: str) -> None:
    """Run one library's tests, and record what passed, failed and was skipped."""
    results = _module("__main__").run(library, device, recorder.left)
    groups, cell = _module("_table").GROUPS, _module("_table").cell
    cells = {group: cell(results.groups.get(group, {})) for group in groups}
    ended = "passed" if results.fine else "failed"
    if results.unfinished:
        ended = "stopped at its time limit"
    recorder.row(
        TABLE,
        {"library": f"{library} {results.version}", "result": ended}
        | cells
        | {"device": results.device},
    )
    for name in results.failures[:MOST_NAMES]:
        recorder.failed(f"{library}: {name}", "the test failed; see the log")
    more = len(results.failures) - MOST_NAMES
    if more > 0:
        recorder.failed(f"{library}: {more} more tests", "see the log")
    if results.unfinished:
        recorder.left_out(f"the rest of {library}'s contract suite", "no time left")
    elif not results.fine and not results.failures:
        why = f"no test failed, but pytest ended with {results.code}; see the log"
        recorder.failed(f"{library}: the suite", why)


def _module(name: str) -> ModuleType:
    """A module of the runner, which is a script and no package."""
    sys.path[:0] = [] if str(RUNNER) in sys.path else [str(RUNNER)]
    if name in sys.modules and name != "__main__":
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(f"gpu_tests_{name}", RUNNER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
