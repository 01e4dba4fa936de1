"""Run the fuzz suites, or go on with a run that was stopped.

    python -m tests.fuzz [--state FOLDER] [--count N] [--fresh] [SUITE …]

A suite writes how far it came, and what failed, to FOLDER/SUITE.json every few seconds. A case is
its number: `python -m tests.fuzz --case 1234 torch` runs that one and shows its traceback.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

NAMES = ("numpy", "torch", "jax", "torch-compiled", "doors")


@dataclass
class State:
    """How far a suite is: cases done, those at jumps of a derivative, and failures by number."""

    done: int = 0
    empty: int = 0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)


def run_suite(name: str, run: Callable[[int], bool], count: int, path: Path, state: State) -> State:
    """Run the cases that are left."""
    saved = started = time.monotonic()
    before = state.seconds
    for index in range(state.done, count):
        try:
            state.empty += not run(index)
        except Exception as error:
            state.failed[str(index)] = f"{type(error).__name__}: {error}"[:500]
            print(f"{name} {index}: {state.failed[str(index)]}", flush=True)
        state.done = index + 1
        now = time.monotonic()
        state.seconds = before + now - started
        if now - saved > 5 or state.done == count:
            saved = now
            path.write_text(json.dumps(asdict(state), indent=1))
    return state


def main() -> int:
    """Run what was asked for; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--state", type=Path, default=Path("out/fuzz"), help="folder of results")
    parser.add_argument("--count", type=int, help="cases of each suite, instead of a full run's")
    parser.add_argument("--case", type=int, help="run this one alone")
    parser.add_argument("--fresh", action="store_true", help="forget what was done")
    arguments = parser.parse_args()
    if unknown := set(arguments.suites) - set(NAMES):
        parser.error(f"suites are {', '.join(NAMES)}; got {', '.join(sorted(unknown))}")
    warnings.simplefilter("error")
    # kernels of OpenBLAS also compute with what lies beside small arrays, and discard it
    warnings.filterwarnings("ignore", "invalid value encountered in matmul", RuntimeWarning)
    arguments.state.mkdir(parents=True, exist_ok=True)
    failures = 0
    for name in arguments.suites or NAMES:
        run, full = _suite(name)
        if arguments.case is not None:
            try:
                print("passed" if run(arguments.case) else "passed, at a jump of its derivative")
            except Exception:
                traceback.print_exc()
                failures += 1
            continue
        path = arguments.state / f"{name}.json"
        state = State()
        if path.exists() and not arguments.fresh:
            state = State(**json.loads(path.read_text()))
        state = run_suite(name, run, arguments.count or full, path, state)
        failures += len(state.failed)
        print(
            f"{name}: {state.done:,} cases in {state.seconds:.0f} s, {state.empty:,} of them at "
            f"jumps, where no derivative is compared, {len(state.failed):,} failed",
            flush=True,
        )
    return min(failures, 1)


def _suite(name: str) -> tuple[Callable[[int], bool], int]:
    # libraries are imported for the suites that are run
    if name == "doors":
        from tests.fuzz import _doors

        return _doors.run, _doors.count()
    from tests.fuzz._suites import SUITES

    suite = SUITES[name]
    return suite.run, suite.count


if __name__ == "__main__":
    sys.exit(main())
