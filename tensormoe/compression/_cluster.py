"""Groups decomposed by the workers of a Dask cluster.

A task is a group, and leaves the file of its factors in an inbox. The process that called takes it
from there, keeps the journal, and writes all else.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import shutil
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from queue import Empty, Queue
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from tensormoe import __version__
from tensormoe._extras import require
from tensormoe._format import format_bytes
from tensormoe.checkpoint._files import PARTIAL_SUFFIX, sync_folder
from tensormoe.compression._calibrated import calibration_identity
from tensormoe.compression._effort import BASE_MEMORY
from tensormoe.compression._measure import GroupReport
from tensormoe.compression._plan import (
    CompressionPlan,
    GroupPlan,
    longest_first,
    settings_of,
)
from tensormoe.compression._worker import SHARED, Task, check_version, compress_task
from tensormoe.errors import CheckpointError, ClusterError, PlanError

if TYPE_CHECKING:
    from distributed import Client, Future

# seconds until a scheduler has to answer, and a worker to be there
_REACHED = 10.0
# seconds that a cluster may be without workers in the middle: those that died are started anew
_REPLACED = 60.0
# seconds until a scheduler that hangs is taken for lost
_HANGS = 60.0
# seconds between two looks at the workers
_LOOKS = 2.0
# tasks in flight per thread: one at work and the next one, which clusters that grow have to see
_AHEAD = 2

_CONTINUES = "What is done is kept, and the same command goes on from there."


@contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of a scheduler for a command, which alone prints; closed at the end.

    Raises:
        MissingDependencyError: Dask distributed is not installed.
        ClusterError: no scheduler answers there.
    """
    require("a cluster", ("distributed",), "cluster")
    from distributed import Client

    try:
        # Dask would take an empty address for a wish to start a cluster
        if not address.strip():
            raise ValueError("it is empty")
        with _no_logs():
            client = Client(address, timeout=_REACHED, set_as_default=False)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ClusterError(
            f"no scheduler answers at {address!r} within {_REACHED:g} seconds: {error}. Start one "
            "with: dask scheduler, and pass the address that it prints, such as tcp://host:8786."
        ) from None
    with _no_logs(), client:
        yield client


@contextmanager
def _no_logs() -> Iterator[None]:
    """Without Dask's own messages, pages of them where a connection is lost."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def check_cluster(client: Client, plan: CompressionPlan, max_memory: int | None) -> None:
    """Refuse a cluster that cannot do the work.

    Raises:
        TypeError: not a client of Dask's, or one for coroutines.
        ClusterError: no scheduler, no workers, or others than this version of tensormoe.
        PlanError: a worker with too little memory for as many groups as it has threads.
    """
    require("a client", ("distributed",), "cluster")
    from distributed import Client

    if not isinstance(client, Client) or client.asynchronous:
        raise TypeError(f"client must be a distributed.Client, not asynchronous; got {client!r}.")
    _workers(client, _REACHED)
    with _reaching():
        # by the names of functions that every Python has: other versions may have none of ours
        asked = (pkgutil.resolve_name, "tensormoe:__version__")
        versions = client.run(*asked, on_error="return")
        info = client.scheduler_info(n_workers=-1)["workers"]
    for worker, version in versions.items():
        check_version(__version__, version, worker)
    for worker, each in info.items():
        limits = [limit for limit in (max_memory, each["memory_limit"]) if limit]
        needed = BASE_MEMORY + each["nthreads"] * (plan.memory - BASE_MEMORY)
        if limits and needed > min(limits):
            raise PlanError(
                f"a worker must have {format_bytes(needed)} of memory for a group on each of its "
                f"threads; worker {worker} has {format_bytes(min(limits))} and "
                f"{each['nthreads']} threads. Start workers with --nthreads 1, raise "
                "--memory-limit or max_memory, or lower the budget or the rank."
            )


def on_cluster(
    client: Client, plan: CompressionPlan, groups: Sequence[GroupPlan], paths: Mapping[str, str]
) -> Generator[tuple[GroupPlan, GroupReport]]:
    """Decompose groups; those that take longest first, results as they come.

    Close the iterator when it is left early: what is not done then is cancelled.

    Args:
        client: of the cluster, checked.
        plan: of the compression.
        groups: what is left to do.
        paths: of the files of factors by the name of the group, in a folder of the output.

    Raises:
        ClusterError: the cluster, or all of its workers, were lost.
        TensormoeError: a group that can't be done.
    """
    waiting = deque(longest_first(groups))
    # of the file as it is now, not when a task is sent
    marks = calibration_identity(plan.settings)
    running: dict[Future[GroupReport], GroupPlan] = {}
    ended: Queue[Future[GroupReport]] = Queue()
    folder = os.path.dirname(os.path.dirname(next(iter(paths.values()))))
    with _new_inbox(folder) as inbox:
        try:
            while waiting or running:
                slots = _AHEAD * sum(_workers(client, _REPLACED).values())
                while waiting and len(running) < slots:
                    each = waiting.popleft()
                    file = os.path.basename(paths[each.group.name])
                    task = _task(plan, each, inbox, file, marks)
                    with _reaching():
                        future = client.submit(compress_task, task, pure=False)
                    running[future] = each
                    future.add_done_callback(ended.put)
                try:
                    future = ended.get(timeout=_LOOKS)
                except Empty:
                    continue
                report = _result(future, running[future])
                if report is None:
                    future.add_done_callback(ended.put)
                    continue
                each = running.pop(future)
                _take(inbox, paths[each.group.name])
                yield each, report
        finally:
            # of a scheduler that is lost there is nothing to cancel
            with suppress(Exception):
                client.cancel(list(running))


def _task(
    plan: CompressionPlan, each: GroupPlan, inbox: str, file: str, marks: Mapping[str, Any]
) -> Task:
    shards = {
        shard.path: shard
        for key in sorted(each.group.stored_keys)
        for shard in (plan.model.places[key][0],)
    }
    read = tuple((path, dict(shard.identity)) for path, shard in shards.items())
    settings = settings_of(plan, each)
    return Task(__version__, inbox, file, read, marks, each.group, settings, each.budget)


def _result(future: Future[GroupReport], each: GroupPlan) -> GroupReport | None:
    """The report of a task that ended; None if its worker died with it, and it runs again."""
    from distributed import KilledWorker

    if future.status == "error":
        error = future.exception()
        if isinstance(error, KilledWorker):
            raise ClusterError(
                f"{each.group.name!r}: {error} If they ran out of memory, start workers with a "
                f"--memory-limit of {format_bytes(each.memory)} per thread. {_CONTINUES}"
            ) from None
        if isinstance(error, ImportError):
            raise ClusterError(
                f"workers must have tensormoe {__version__} with NumPy; one of them says: {error}. "
                f"{_CONTINUES}"
            ) from None
        # with the worker's traceback
        future.result()
    if future.status == "cancelled":
        raise ClusterError(f"the scheduler was lost, or has dropped the work. {_CONTINUES}")
    try:
        report: GroupReport = future.result(timeout=_REACHED)
    except (OSError, CancelledError):
        return None
    return report


def _take(inbox: str, path: str) -> None:
    """Give a file in the inbox its name."""
    source = os.path.join(inbox, os.path.basename(path))
    try:
        os.replace(source, path)
    except OSError as error:
        raise CheckpointError(
            f"{source!r} was written by a worker and can't be moved here: "
            f"{error.strerror or error}. {SHARED}"
        ) from None
    sync_folder(os.path.dirname(path))


@contextmanager
def _new_inbox(folder: str) -> Iterator[str]:
    inbox = os.path.join(folder, f".{os.urandom(8).hex()}{PARTIAL_SUFFIX}")
    try:
        os.mkdir(inbox)
    except OSError as error:
        raise CheckpointError(f"{inbox!r} can't be made: {error.strerror or error}.") from None
    try:
        yield inbox
    finally:
        # under another name first, so that nothing is written to it meanwhile
        gone = os.path.join(folder, f".{os.urandom(8).hex()}{PARTIAL_SUFFIX}")
        with suppress(OSError):
            os.rename(inbox, gone)
        for each in (gone, inbox):
            shutil.rmtree(each, ignore_errors=True)


def _workers(client: Client, within: float) -> Mapping[str, int]:
    """Threads of each worker.

    Raises:
        ClusterError: the scheduler is lost, or there is no worker within some seconds.
    """
    end = monotonic() + within
    while True:
        with _reaching():
            found: Mapping[str, int] = client.nthreads(callback_timeout=_HANGS)
        if found:
            return found
        if monotonic() > end:
            raise ClusterError(
                f"a cluster must have a worker; there was none for {within:g} seconds. Start some "
                f"with: dask worker ADDRESS --nthreads 1. {_CONTINUES}"
            )
        sleep(min(0.1, within))


@contextmanager
def _reaching() -> Iterator[None]:
    """Turn what Dask raises where a scheduler is lost into one error."""
    try:
        yield
    # the last one of a client that has closed itself in the meantime
    except (OSError, RuntimeError, CancelledError, AttributeError) as error:
        # a timeout may come without words
        reason = str(error) or ("timed out" if isinstance(error, TimeoutError) else repr(error))
        raise ClusterError(f"the scheduler was lost: {reason}. {_CONTINUES}") from None
