"""Parts of a GPU report: processes with deadlines, of which each may fail alone.

Standard library alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from _gpu_records import Found, read

HERE = Path(__file__).resolve().parent
# share of its time, and seconds, before its deadline in which a part begins nothing more
MARGIN = 0.1, 12.0
LAST_LINES = 12


@dataclass(frozen=True)
class Part:
    """One part.

    Args:
        name: of its files.
        title: in the report.
        seconds: its share; what parts before it leave is added.
        command: what to run instead of the worker, for a part of another kind.
    """

    name: str
    title: str
    seconds: float
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The outcome of a part.

    Attributes:
        part: which one.
        found: its results.
        problem: why it did not come to its end; empty if it did.
        seconds: that it took.
        last: the last lines of its log, if there was a problem.
    """

    part: Part
    found: Found
    problem: str
    seconds: float
    last: str = ""


# each group runs at once: the suites measure no time, and have the device for themselves
SCHEDULE: tuple[tuple[Part, ...], ...] = (
    tuple(
        Part(f"suite-{library}", f"contract suite, {library}", 140)
        for library in ("torch", "jax", "cupy")
    ),
    (Part("torch-device", "the device, on PyTorch", 15),),
    (Part("torch-eager", "PyTorch, eager", 50),),
    (Part("jax-jitted", "JAX, jitted", 90),),
    (Part("torch-compiled", "PyTorch, compiled", 115),),
    (Part("torch-peers", "PyTorch, other layers", 35),),
    (Part("torch-graphs", "PyTorch, CUDA graphs", 15),),
)


def run_all(
    schedule: Sequence[Sequence[Part]],
    seconds: float,
    folder: Path,
    options: Sequence[str],
    environment: Mapping[str, str],
    said: Callable[[str], object] = print,
) -> list[Outcome]:
    """Run parts group by group.

    Args:
        schedule: groups of parts; those of a group run at once.
        seconds: for all. A group gets what the shares of those behind it do not need.
        folder: of results and logs; those of an earlier run are overwritten.
        options: for every worker.
        environment: of every process.
        said: is told what begins and how it ended.
    """
    outcomes = []
    end = monotonic() + seconds
    whole = sum(_share(group) for group in schedule)
    scale = min(1.0, seconds / whole) if whole else 1.0
    for place, group in enumerate(schedule):
        behind = scale * sum(_share(each) for each in schedule[place + 1 :])
        limit = max(1.0, end - monotonic() - behind)
        said(f"== {', '.join(part.title for part in group)}: {limit:.0f} s at most")
        for outcome in _run_group(group, limit, folder, options, environment):
            said(f"{outcome.part.title}: {outcome.problem or 'done'}, {outcome.seconds:.0f} s")
            outcomes.append(outcome)
    return outcomes


def _share(group: Sequence[Part]) -> float:
    return max((part.seconds for part in group), default=0.0)


@dataclass
class _Running:
    part: Part
    process: subprocess.Popen[bytes]
    log: Path


def _run_group(
    group: Sequence[Part],
    limit: float,
    folder: Path,
    options: Sequence[str],
    environment: Mapping[str, str],
) -> list[Outcome]:
    begin = monotonic()
    running: list[_Running] = []
    outcomes = []
    try:
        for part in group:
            running.append(_started(part, limit, folder, options, environment))
        while running:
            for each in list(running):
                late = monotonic() > begin + limit
                if each.process.poll() is not None or late:
                    _kill(each.process)
                    running.remove(each)
                    problem = f"stopped after its {limit:.0f} s" if late else ""
                    outcomes.append(_outcome(each, problem, monotonic() - begin, folder))
            sleep(0.05)
        return outcomes
    finally:
        # somebody interrupts the report
        for each in running:
            _kill(each.process)


def _started(
    part: Part,
    limit: float,
    folder: Path,
    options: Sequence[str],
    environment: Mapping[str, str],
) -> _Running:
    log = folder / f"{part.name}.log"
    (folder / f"{part.name}.jsonl").unlink(missing_ok=True)
    begun = max(0.5 * limit, limit - max(MARGIN[0] * limit, MARGIN[1]))
    command = part.command or (
        sys.executable,
        # a crash says where
        "-Xfaulthandler",
        str(HERE / "_gpu_worker.py"),
        part.name,
        f"--seconds={begun:.1f}",
        f"--folder={folder}",
        *options,
    )
    with log.open("wb") as file:
        # a group of processes: compilers and pytest end with the part that started them
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,
        )
    return _Running(part, process, log)


def _outcome(running: _Running, problem: str, seconds: float, folder: Path) -> Outcome:
    found = read(folder / f"{running.part.name}.jsonl")
    code = running.process.returncode
    if not problem and code:
        problem = f"ended with {_code(code)}"
    if not problem and not found.done:
        problem = "ended without results"
    last = ""
    if problem:
        text = running.log.read_text("utf-8", errors="replace")
        last = "\n".join([line for line in text.splitlines() if line.strip()][-LAST_LINES:])
    return Outcome(running.part, found, problem, seconds, last)


def _code(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it started, whether it has ended itself or not."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # a process in the middle of a call to a broken driver cannot be ended
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
