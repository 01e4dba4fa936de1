"""Processes that talk by gloo, started once: functions run in all, and all results return."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["Ranks"]

# imported once, by the process that all others are forks of; none of ours, as that process doesn't
# have the paths of this one
LIBRARIES = [
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]

# a collective that waits for a process that never comes ends before the test does
PATIENCE, LIMIT = 60, 120


class Ranks:
    """Some processes with a process group; started by the first call.

    A call takes a function of a module, and plain arguments. When a process fails or takes too
    long, all end, and the next call starts new ones.
    """

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self._processes: list[Any] = []
        self._ends: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(rank, *arguments)`` in each process; return the results.

        Raises:
            AssertionError: it raised in some process; says what and where.
        """
        if not self._processes:
            self._start()
        try:
            for end in self._ends:
                end.send((function, arguments))
            answers = [self._answer(rank) for rank in range(self.count)]
        except BaseException:
            self.stop()
            raise
        problems = [text for text, _ in answers if text]
        if problems:
            self.stop()
            raise AssertionError("\n".join(problems))
        return [result for _, result in answers]

    def stop(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.terminate()
            process.join(10)
            if process.is_alive():
                process.kill()
        for end in self._ends:
            end.close()
        self._processes, self._ends = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.count):
            here, there = context.Pipe()
            arguments = rank, self.count, str(store), there
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._ends.append(here)

    def _answer(self, rank: int) -> tuple[str, Any]:
        if not self._ends[rank].poll(LIMIT):
            return f"rank {rank}: no answer within {LIMIT} seconds", None
        try:
            answer: tuple[str, Any] = self._ends[rank].recv()
        except EOFError:
            return f"rank {rank}: the process died", None
        return answer


def _serve(rank: int, count: int, store: str, end: Connection) -> None:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=PATIENCE),
    )
    warnings.simplefilter("error")
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        try:
            answer = "", function(rank, *arguments)
        except BaseException:  # PyTorch has errors that are no exceptions
            answer = f"rank {rank}:\n{traceback.format_exc()}", None
        end.send(answer)
