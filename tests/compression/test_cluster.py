"""Models compressed by the workers of a Dask cluster, which come, die and are replaced."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster

from tensormoe.checkpoint._files import PARTIAL_SUFFIX
from tensormoe.cli import main
from tensormoe.compression import (
    Compression,
    CompressionProgress,
    _cluster,
    _run,
    _stack,
    compress_checkpoint,
    plan_compression,
)
from tensormoe.errors import CheckpointError, ClusterError, PlanError, RankError
from tests._compress_models import PATTERN, experts, save
from tests._python import ENVIRONMENT
from tests.compression._clusters import (
    ENDLESS,
    GROUPS,
    KILL_ONCE,
    MENDED,
    WANTED,
    Processes,
    continued,
    in_process,
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


def after(groups: int, action: Callable[[], object]) -> Callable[[CompressionProgress], None]:
    """A callback that does something once when so many groups are done."""
    seen: list[str] = []

    def told(now: CompressionProgress) -> None:
        if now.stage == "experts" and len(seen) <= groups:
            seen.append(now.name)
            if len(seen) == groups + 1:
                action()

    return told


def interrupt() -> None:
    raise KeyboardInterrupt


def journal(output: Path) -> list[str]:
    """Names of the groups that are done."""
    text = Path(f"{output}{PARTIAL_SUFFIX}", ".tensormoe-journal").read_text()
    return [json.loads(line)["group"] for line in text.splitlines()[1:]]


def in_parts(output: Path) -> list[Path]:
    """Files and folders that were left in the middle."""
    return [p for p in Path(f"{output}{PARTIAL_SUFFIX}").rglob("*") if PARTIAL_SUFFIX in p.name]


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
    with subprocess.Popen(
        [*map(str, command)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        soon(marker.exists)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
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
) -> None:
    output, take = tmp_path / "out", _cluster._take
    words = ["compress", str(model), "--experts", PATTERN[0], "--budget", "50%", "--json"]
    with Processes(tmp_path) as first, monkeypatch.context() as patch:

        def last(*given: str) -> None:
            take(*given)
            first.scheduler.kill()

        patch.setattr(_cluster, "_take", last)
        words += ["--output", str(output), "--scheduler", first.address]
        assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the scheduler was lost")
    assert error.endswith("the same command goes on from there.\n")
    # Dask's own pages of messages are not shown
    assert error.count("\n") == 1
    assert len(journal(output)) == 1
    assert not in_parts(output)
    with Processes(tmp_path, first.address):
        assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(json.loads(captured.out)["groups"]) == GROUPS
    continued(model, output)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "nonsense",
        "tcp://127.0.0.1:1",
        "tcp://127.0.0.1",
        "ftp://127.0.0.1:80",
        "tcp://no.invalid:8786",
    ],
)
def test_addresses_where_no_scheduler_is(
    address: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_cluster, "_REACHED", 0.3)
    words = ["compress", model, "--experts", PATTERN[0], "--rank", "2", "--scheduler", address]
    assert main([*map(str, words), "--output", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: no scheduler answers at {address!r} within 0.3 seconds")
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_no_workers(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cluster, "_REACHED", 0.1)
    monkeypatch.setattr(_cluster, "_REPLACED", 0.1)
    output = tmp_path / "out"
    with in_process(workers=0) as client:
        with pytest.raises(ClusterError, match=r"must have a worker; there was none for 0\.1 s"):
            compress_checkpoint(model, output, WANTED, client=client)
        assert not list(tmp_path.iterdir())
        client.cluster.scale(1)
        client.wait_for_workers(1)
        leave = after(1, lambda: client.cluster.scale(0))
        with pytest.raises(ClusterError, match=r"none for 0\.1 seconds.*same command goes on"):
            compress_checkpoint(model, output, WANTED, client=client, callback=leave)
        assert 1 <= len(journal(output)) < GROUPS
    with pytest.raises(ClusterError, match="scheduler was lost"):
        compress_checkpoint(model, output, WANTED, client=client)
    continued(model, output)


def test_another_version(
    threads: Client, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = r"same tensormoe as this process, 1\.2\.3; worker \S+ has "
    with monkeypatch.context() as patch:
        patch.setattr(_cluster, "__version__", "1.2.3")
        with pytest.raises(ClusterError, match=rule):
            compress_checkpoint(model, tmp_path / "out", WANTED, client=threads)
    # a worker that comes when all are asked
    task = _cluster._Task("1.2.3", "", "", (), _groups(model)[0].group, WANTED, None)
    with pytest.raises(ClusterError, match=rule):
        threads.submit(_cluster.compress_task, task).result()
    monkeypatch.setattr(_cluster.pkgutil, "resolve_name", _missing)
    with pytest.raises(ClusterError, match=r"has none \(No module named 'tensormoe'\)\. Start it"):
        compress_checkpoint(model, tmp_path / "out", WANTED, client=threads)
    assert not list(tmp_path.iterdir())


def _missing(name: str) -> None:
    raise ModuleNotFoundError("No module named 'tensormoe'")


def test_other_file_systems(
    threads: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = made(tmp_path / "model"), tmp_path / "out"
    shards = sorted(model.glob("*.safetensors"))

    def refused(rule: str, action: Callable[[], object] = lambda: None) -> None:
        with pytest.raises(CheckpointError, match=rf"worker \S+: .*{rule}.*file system"):
            compress_checkpoint(model, output, WANTED, client=threads, callback=after(0, action))
        assert not list(tmp_path.glob("out*"))

    @contextmanager
    def elsewhere(folder: str) -> Iterator[str]:
        yield os.path.join(folder, "not", "here")

    with monkeypatch.context() as patch:
        patch.setattr(_cluster, "_new_inbox", elsewhere)
        refused("output folder .*not' of this compression is not there")
    refused(
        "model-00002.* must be the file that .* its changed differ", lambda: os.utime(shards[1])
    )
    refused("must name an existing checkpoint", lambda: model.rename(tmp_path / "moved"))


def test_errors_of_groups(threads: Client, tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = experts(rng)
    key = list(tensors)[2]
    model = save(tmp_path / "m.safetensors", tensors)
    strict = Compression("cp", tolerance=1e-6, experts=PATTERN)
    with pytest.raises(RankError, match=r"worker \S+: .*w1.*no rank reaches"):
        compress_checkpoint(model, tmp_path / "out", strict, client=threads)
    tensors[key][1, 1] = torch.nan
    save(model, tensors)
    with pytest.raises(CheckpointError, match=rf"worker \S+: .*must be finite.*{key}"):
        compress_checkpoint(model, tmp_path / "out", WANTED, client=threads)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_memory_of_workers(threads: Client, model: Path, tmp_path: Path) -> None:
    needed = plan_compression(model, WANTED).memory
    # enough for a group, and not for one on each of two threads
    with pytest.raises(PlanError, match=r"for a group on each of its threads; .* 2 threads"):
        compress_checkpoint(model, tmp_path / "out", WANTED, client=threads, max_memory=needed)
    with (
        in_process(memory_limit="100MiB") as small,
        pytest.raises(PlanError, match=r"has 100 MiB and 1 threads.*--memory-limit"),
    ):
        compress_checkpoint(model, tmp_path / "out", WANTED, client=small)
    assert not list(tmp_path.iterdir())
    with in_process() as one:
        compress_checkpoint(model, tmp_path / "out", WANTED, client=one, max_memory=needed)


def test_what_is_no_client(cluster: LocalCluster, model: Path, tmp_path: Path) -> None:
    async def coroutines() -> Client:
        async with Client(address, asynchronous=True, set_as_default=False) as found:
            return found

    address = cluster.scheduler_address
    for wrong in (address, object(), asyncio.run(coroutines())):
        with pytest.raises(TypeError, match=r"must be a distributed\.Client"):
            compress_checkpoint(model, tmp_path / "out", WANTED, client=wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_whole_output_needs_no_cluster(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Client
) -> None:
    compress_checkpoint(model, tmp_path / "out", WANTED)
    monkeypatch.setattr(_run, "check_cluster", None)
    found = compress_checkpoint(model, tmp_path / "out", WANTED, client=threads)
    assert len(found.groups) == GROUPS
