"""Clusters that cannot compress a model, and what the error says; nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import Client

from tensormoe.cli import main
from tensormoe.compression import (
    Compression,
    _cluster,
    _run,
    _stack,
    compress_checkpoint,
    plan_compression,
)
from tensormoe.compression._worker import Task, compress_task
from tensormoe.errors import CheckpointError, ClusterError, PlanError, RankError
from tests._compress_models import PATTERN, experts, save
from tests.compression._clusters import (
    GROUPS,
    WANTED,
    Processes,
    after,
    continued,
    in_process,
    journal,
    made,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture(scope="module")
def threads() -> Iterator[Client]:
    """A worker with two threads in this process."""
    with in_process(threads_per_worker=2) as found:
        yield found


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


def test_without_dask(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    words = ["compress", str(model), "--experts", PATTERN[0], "--budget", "50%", "--json"]
    words += ["--output", str(tmp_path / "out")]
    assert main([*words, "--scheduler", "tcp://127.0.0.1:1"]) == 2
    assert capsys.readouterr().err == (
        "error: a cluster needs distributed, which is not installed. Install it with: pip install "
        "'tensormoe[cluster]'.\n"
    )
    assert main(words) == 0


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


def test_a_scheduler_that_hangs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cluster, "_HANGS", 0.5)
    with Processes(tmp_path) as started, Client(started.address, set_as_default=False) as client:
        os.kill(started.scheduler.pid, signal.SIGSTOP)
        try:
            with pytest.raises(ClusterError, match=r"scheduler was lost: timed out"):
                compress_checkpoint(model, tmp_path / "out", WANTED, client=client)
        finally:
            os.kill(started.scheduler.pid, signal.SIGCONT)
    assert not list(tmp_path.glob("out*"))


def test_another_version(
    threads: Client, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = r"same tensormoe as this process, 1\.2\.3; worker \S+ has "
    with monkeypatch.context() as patch:
        patch.setattr(_cluster, "__version__", "1.2.3")
        with pytest.raises(ClusterError, match=rule):
            compress_checkpoint(model, tmp_path / "out", WANTED, client=threads)
    # a worker that comes when all are asked
    group = plan_compression(model, WANTED).groups[0].group
    task = Task("1.2.3", "", "", (), {}, group, WANTED, None)
    with pytest.raises(ClusterError, match=rule):
        threads.submit(compress_task, task).result()
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
        # said before anything is read
        patch.setattr(_stack, "read_stack", None)
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


def test_what_is_no_client(threads: Client, model: Path, tmp_path: Path) -> None:
    async def coroutines() -> Client:
        async with Client(address, asynchronous=True, set_as_default=False) as found:
            return found

    address = threads.scheduler.address
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
