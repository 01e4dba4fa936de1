"""The GPU's branches of the report, on a machine without one: CUDA is stood in for by the CPU.

Tensors that are asked for on ``"cuda"`` are made on the CPU, and the functions of ``torch.cuda``
that the report calls return at once. No figure means anything here; every line runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from _gpu_jax import JaxTables
from _gpu_peers import PeerTables
from _gpu_records import Found, Recorder, read
from _gpu_roofline import published
from _gpu_settings import BFLOAT16, FLOAT32, TF32, TINY
from _gpu_timing import torch_elapsed
from _gpu_torch import TorchTables

ALL = {BFLOAT16.name, FLOAT32.name, TF32.name}
# what the CPU cannot do: its products are never rounded to TF32
NOT_ROUNDED = "ArithmeticError: products should be rounded"
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=150 * 10**9,
    L2_cache_size=2**20,
)


class OnCpu(TorchFunctionMode):
    """Devices called cuda become the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Event:
    """A time by the clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


class Graph:
    """Calls nothing: what it has captured is not known here."""

    def replay(self) -> None:
        pass


@contextmanager
def capturing(graph: Graph) -> Iterator[None]:
    yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stands_in: dict[str, Callable[..., Any]] = {
        "CUDAGraph": Graph,
        "Event": Event,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "empty_cache": lambda: None,
        "get_device_capability": lambda: (9, 0),
        "get_device_properties": lambda index: PROPERTIES,
        "graph": capturing,
        "is_available": lambda: True,
        "max_memory_allocated": lambda: 3 * 2**20,
        "mem_get_info": lambda: (2**34, 2**35),
        "memory_allocated": lambda: 2**20,
        "reset_peak_memory_stats": lambda: None,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None,
    }
    for name, value in stands_in.items():
        assert hasattr(torch.cuda, name), name
        monkeypatch.setattr(torch.cuda, name, value)
    before = torch.get_float32_matmul_precision()
    with OnCpu():
        yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path / "x.jsonl", 600)


def rows(found: Found, title: str) -> list[dict[str, Any]]:
    made = found.tables[title]
    assert {row["precision"] for row in made} <= ALL
    return made


# what PyTorch's compiler imports
@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
@pytest.mark.usefixtures("cuda")
def test_tables_of_pytorch(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    # a compiler does not follow what stands in here
    monkeypatch.setattr(TorchTables, "_compile", lambda self, module: module)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    tables = TorchTables(recorder, TINY, "cuda", published(PROPERTIES.name) or {})
    assert {each.name for each in tables.precisions} == ALL
    rooflines = tables.device_facts()
    assert rooflines == published(PROPERTIES.name)
    tables.eager()
    tables.compiled()
    tables.graphs()
    found = read(recorder.path)
    assert found.facts["device"] == PROPERTIES.name
    assert found.facts["roofline"] == "published peaks"
    assert found.facts[f"published TFLOP/s, {TF32.name}"] == 494.5
    assert found.facts["L2 cache, MiB"] == 1
    assert [each for each in found.failed if not each[1].startswith(NOT_ROUNDED)] == []
    for title in ("PyTorch, eager", "PyTorch, compiled"):
        for row in rows(found, title):
            assert None not in row.values(), title
    for row in rows(found, "PyTorch, forward in a CUDA graph"):
        assert row["L2 cold µs"] >= 0
        assert row["% of roofline"] > 0


@pytest.mark.usefixtures("cuda")
def test_a_device_without_tensor_cores_for_it(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    tables = TorchTables(recorder, TINY, "cuda", {})
    assert tables.precisions == (FLOAT32,)
    tables.device_facts()
    left_out = read(recorder.path).left_out
    assert {what for what, _ in left_out} == {BFLOAT16.name, TF32.name}


@pytest.mark.usefixtures("cuda")
def test_tables_of_peers(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("_gpu_peers.TOKENS", 2)
    PeerTables(recorder, replace(TINY, every=5), "cuda").run()
    found = read(recorder.path)
    assert found.failed == []
    made = [row for table in found.tables.values() for row in table]
    assert {row["precision"] for row in made} == {BFLOAT16.name, FLOAT32.name}
    assert all(row["forward MiB"] == row["step MiB"] == 2 for row in made)


@pytest.mark.usefixtures("cuda")
def test_peers_that_do_not_fit_are_not_made(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**20, 2**35))
    PeerTables(recorder, TINY, "cuda").run()
    found = read(recorder.path)
    assert found.tables == {}
    assert found.failed == []
    assert any("parameters do not fit in memory" in why for _, why in found.left_out)


def test_table_of_jax(recorder: Recorder) -> None:
    JaxTables(recorder, TINY, "cuda", published(PROPERTIES.name) or {}).jitted()
    found = read(recorder.path)
    assert [each for each in found.failed if not each[1].startswith(NOT_ROUNDED)] == []
    assert [what for what, _ in found.failed] == [f"error of a product on JAX, {TF32.name}"]
    for row in rows(found, "JAX, jitted"):
        assert None not in row.values()


@pytest.mark.usefixtures("cuda")
def test_events_are_around_all_calls() -> None:
    called: list[int] = []
    seconds = torch_elapsed("cuda")(lambda: called.append(1), 5)
    assert len(called) == 5
    assert seconds >= 0
