"""Dask clusters on this machine, and workers that misbehave."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client, LocalCluster

from tensormoe.checkpoint._files import PARTIAL_SUFFIX
from tensormoe.compression import Compression, CompressionProgress, compress_checkpoint
from tests._compress_models import PATTERN, content, experts, save_shards
from tests._python import ENVIRONMENT

WANTED = Compression("tensor_ring", budget=0.5, experts=PATTERN)
GROUPS = 5


def made(path: Path) -> Path:
    """Groups of unequal sizes in two shards."""
    rng = np.random.default_rng(0)
    groups = [experts(rng, columns=8 + 2 * layer, layer=layer) for layer in range(GROUPS)]
    first, second = (
        {k: v for each in part for k, v in each.items()} for part in (groups[:2], groups[2:])
    )
    return save_shards(path, first, second)


def continued(model: Path, output: Path, wanted: Compression = WANTED, **given: Any) -> None:
    """Run to the end, which leaves every byte of a run without a cluster, and nothing else."""
    compress_checkpoint(model, output, wanted, **given)
    alone = output.with_name(f"{output.name} alone")
    compress_checkpoint(model, alone, wanted)
    assert content(output) == content(alone)
    assert not list(output.parent.glob(f"{output.name}.*"))


@contextmanager
def in_process(workers: int = 1, **options: Any) -> Iterator[Client]:
    """A cluster whose scheduler and workers are threads of this process."""
    given = {"threads_per_worker": 1, "dashboard_address": ":0", "processes": False, **options}
    with LocalCluster(n_workers=workers, **given) as cluster, Client(cluster) as client:
        yield client


def on_workers(client: Client, source: str) -> None:
    """Run source in every worker; workers that are started later never see it."""
    client.run(exec, source, {})


KILL_ONCE = """
import os, signal
from tensormoe.compression import _stack

def dying(*given, decompose=_stack.decompose, **named):
    found = decompose(*given, **named)
    try:
        os.close(os.open({marker!r}, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return found
    os.kill(os.getpid(), signal.SIGKILL)

_stack.decompose = dying
"""
"""The first worker that has found factors, and not written them, kills itself."""

ENDLESS = """
import pathlib, time
from tensormoe.compression import _stack, _worker

def endless(*given, callback, **named):
    pathlib.Path({marker!r}).touch()
    while True:
        time.sleep(0.02)
        callback(None)

_worker._LOOKS = 0.1
_worker._kept = _stack.decompose
_stack.decompose = endless
"""
"""Searches that end when nobody waits for them; ``MENDED`` undoes it."""

MENDED = """
from tensormoe.compression import _stack, _worker

_stack.decompose = _worker._kept
"""


class Processes:
    """A scheduler and a worker as people start them, each a process."""

    def __init__(self, folder: Path, address: str = "tcp://127.0.0.1:0") -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._wanted = address
        self.address = address

    def __enter__(self) -> Processes:
        file = self._folder / "scheduler.json"
        file.unlink(missing_ok=True)
        host, _, port = self._wanted.removeprefix("tcp://").partition(":")
        shared = ("--scheduler-file", str(file))
        self.scheduler = self._start(
            "scheduler", "--host", host, "--port", port, "--no-dashboard", *shared
        )
        self.worker = self._start(
            "worker", "--nthreads", "1", "--no-nanny", "--no-dashboard", *shared
        )
        with Client(scheduler_file=str(file), set_as_default=False) as client:
            client.wait_for_workers(1)
            self.address = client.scheduler.address
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", *words]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=ENVIRONMENT, cwd=self._folder, **quiet)  # type: ignore[call-overload]
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process


def soon(condition: Any, seconds: float = 60) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def after(groups: int, action: Callable[[], object]) -> Callable[[CompressionProgress], None]:
    """A callback that does something once when so many groups are done."""
    seen: list[str] = []

    def told(now: CompressionProgress) -> None:
        if now.stage == "experts" and len(seen) <= groups:
            seen.append(now.name)
            if len(seen) == groups + 1:
                action()

    return told


def journal(output: Path) -> list[str]:
    """Names of the groups that are done."""
    text = Path(f"{output}{PARTIAL_SUFFIX}", ".tensormoe-journal").read_text()
    return [json.loads(line)["group"] for line in text.splitlines()[1:]]


def in_parts(output: Path) -> list[Path]:
    """Files and folders that were left in the middle."""
    return [p for p in Path(f"{output}{PARTIAL_SUFFIX}").rglob("*") if PARTIAL_SUFFIX in p.name]
