"""Models compressed by the workers of a Dask cluster, which come, die and are replaced."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster

from tensormoe.checkpoint._files import PARTIAL_SUFFIX
from tensormoe.cli import main
from tensormoe.compression import (
    _cluster,
    _stack,
    compress_checkpoint,
    plan_compression,
)
from tensormoe.errors import ClusterError
from tests._compress_models import PATTERN
from tests._python import ENVIRONMENT
from tests.compression._clusters import (
    ENDLESS,
    GROUPS,
    KILL_ONCE,
    MENDED,
    WANTED,
    Processes,
    after,
    continued,
    in_parts,
    in_process,
    journal,
    made,
    on_workers,
    soon,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Two workers, each a process with a nanny, which starts another one when it dies."""
    options = {"threads_per_worker": 1, "dashboard_address": ":0"}
    with LocalCluster(n_workers=2, **options) as found:
        yield found


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster, set_as_default=False) as found:
        found.wait_for_workers(2)
        yield found


@pytest.fixture(scope="module")
def threads() -> Iterator[Client]:
    """A worker with two threads in this process."""
    with in_process(threads_per_worker=2) as found:
        yield found


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("dense", [False, True])
def test_the_same_bytes(
    dense: bool, client: Client, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, seen = replace(WANTED, dense=dense), []
    with monkeypatch.context() as patch:
        # nothing is decomposed here
        patch.setattr(_stack, "decompose", None)
        found = compress_checkpoint(
            model, tmp_path / "out", wanted, client=client, callback=seen.append
        )
    done = [each for each in seen if each.stage == "experts"]
    assert [each.done for each in done] == sorted(each.done for each in done)
    assert {each.name for each in done} == {"", *(g.group.label for g in _groups(model))}
    assert done[-1].done == done[-1].total == sum(g.group.entries for g in _groups(model))
    assert all(each.search is None for each in seen)
    continued(model, tmp_path / "out", wanted)
    alone = compress_checkpoint(model, tmp_path / "out alone", wanted)
    assert tuple(replace(each, seconds=None) for each in found.groups) == alone.groups


def _groups(model: Path) -> Any:
    return plan_compression(model, WANTED).groups


def test_threads_of_one_worker(threads: Client, model: Path, tmp_path: Path) -> None:
    continued(model, tmp_path / "out", client=threads)


def test_few_tasks_at_a_time_and_the_longest_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Client
) -> None:
    submit, futures, order = threads.submit, [], []

    def counted(function: Any, task: Any, **given: Any) -> Any:
        assert sum(each.status == "pending" for each in futures) < 2 * 2
        futures.append(submit(function, task, **given))
        order.append(task.group.name)
        return futures[-1]

    monkeypatch.setattr(threads, "submit", counted)
    compress_checkpoint(model, tmp_path / "out", WANTED, client=threads)
    seconds = {each.group.name: each.seconds for each in _groups(model)}
    assert order == sorted(seconds, key=lambda name: -seconds[name])
    assert len(set(seconds.values())) == GROUPS


def test_a_killed_worker(client: Client, model: Path, tmp_path: Path) -> None:
    before, marker = set(client.nthreads()), tmp_path / "killed"
    on_workers(client, KILL_ONCE.format(marker=str(marker)))
    continued(model, tmp_path / "out", client=client)
    assert marker.exists()
    assert len(before - set(client.nthreads())) == 1


def test_a_group_that_kills_every_worker(
    cluster: LocalCluster, client: Client, model: Path, tmp_path: Path
) -> None:
    on_workers(client, KILL_ONCE.format(marker=str(tmp_path / "killed")))
    allowed, cluster.scheduler.allowed_failures = cluster.scheduler.allowed_failures, 0
    try:
        with pytest.raises(ClusterError, match=r"experts.*w1.*all those workers died.*--memory-l"):
            compress_checkpoint(model, tmp_path / "out", WANTED, client=client)
    finally:
        cluster.scheduler.allowed_failures = allowed
    continued(model, tmp_path / "out", client=client)


def test_an_interruption_keeps_what_is_done(client: Client, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt, match="2 of 5 groups are done"):
        compress_checkpoint(model, output, WANTED, client=client, callback=after(2, interrupt))
    done = journal(output)
    assert len(done) == 2
    assert not in_parts(output)
    # what a process that was killed leaves
    inbox = Path(f"{output}{PARTIAL_SUFFIX}", f".0123{PARTIAL_SUFFIX}")
    inbox.mkdir()
    (inbox / "factors.safetensors").touch()
    seen: list[str] = []
    callback = after(0, lambda: seen.extend(journal(output)))
    continued(model, output, client=client, callback=callback)
    assert seen == done


def test_work_that_nobody_waits_for_ends(
    client: Client, model: Path, tmp_path: Path, cluster: LocalCluster
) -> None:
    """Ctrl-C in the command, while every worker is busy for ever."""
    marker, output = tmp_path / "busy", tmp_path / "out"
    on_workers(client, ENDLESS.format(marker=str(marker)))
    words = ["compress", model, "--experts", PATTERN[0], "--budget", "50%", "--output", output]
    command = [
        sys.executable,
        "-m",
        "tensormoe.cli",
        *words,
        "--scheduler",
        cluster.scheduler_address,
    ]
    process = subprocess.Popen(
        [*map(str, command)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell's background jobs ignore interrupts, and so do their children unless told
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        soon(marker.exists)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err.decode() == "error: interrupted: nothing is done yet.\n"
    assert not list(tmp_path.glob("out*"))
    on_workers(client, MENDED)
    # on workers that were not started anew
    continued(model, output, client=client)


def test_a_lost_scheduler(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    output, take = tmp_path / "out", _cluster._take
    words = ["compress", str(model), "--experts", PATTERN[0], "--budget", "50%", "--json"]
    with Processes(tmp_path) as first, monkeypatch.context() as patch:

        def last(*given: str) -> None:
            take(*given)
            first.scheduler.kill()
            first.scheduler.wait()

        patch.setattr(_cluster, "_take", last)
        words += ["--output", str(output), "--scheduler", first.address]
        caplog.clear()
        assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the scheduler was lost")
    assert error.endswith("the same command goes on from there.\n")
    assert error.count("\n") == 1
    # Dask has pages of messages for this
    assert not caplog.records
    assert len(journal(output)) == 1
    assert not in_parts(output)
    with Processes(tmp_path, first.address):
        assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(json.loads(captured.out)["groups"]) == GROUPS
    continued(model, output)
