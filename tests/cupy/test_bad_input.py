"""What CuPy's layers refuse: arrays of the host, machines without a device, what doesn't fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensormoe_numpy
from tensormoe import CP, TopK, entmax
from tensormoe.checkpoint import read_checkpoint, save_checkpoint
from tensormoe.errors import BackendError, CheckpointError, MissingDependencyError, ShapeError
from tests._cupy_standin import ADAPTER, ON_DEVICE, Special, Standin, device, installed

tensormoe_cupy = pytest.importorskip("tensormoe_cupy")

HOST = np.ones((3, 8), "float32")
IDS = np.array([0, 4, 8])
SHARES = np.ones((3, 4), "float32")


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    with installed():
        yield


def layer() -> Any:
    return tensormoe_cupy.MuMoE(8, 5, 4, rank=2, seed=0)


def block() -> Any:
    return tensormoe_cupy.MuMoEMLP(8, experts=4, rank=2, seed=0)


def table() -> Any:
    return tensormoe_cupy.MuMoEEmbedding(9, 5, 4, rank=2, seed=0)


def chosen() -> TopK:
    return TopK(np.zeros((3, 1), int), np.ones((3, 1), "float32"))


ON_HOST: dict[str, tuple[str, Callable[[], Any]]] = {
    "input": ("x", lambda: layer()(HOST)),
    "input of the gate": ("x", lambda: layer().coefficients(HOST)),
    "input in training": ("x", lambda: layer().vjp(HOST)),
    "input when prepared": ("x", lambda: layer().prepare()(HOST)),
    "coefficients": ("coefficients of level 0", lambda: layer()(device(HOST), SHARES)),
    "coefficients by index": ("coefficients of level 0", lambda: layer()(device(HOST), chosen())),
    "cotangent": ("the cotangent", lambda: layer().vjp(device(HOST))[1](HOST[:, :5])),
    "cotangent of the gate": (
        r"cotangents\[0\]",
        lambda: layer().route_vjp(device(HOST))[1]([SHARES]),
    ),
    "input of a block": ("x", lambda: block()(HOST)),
    "cotangent of a block": ("the cotangent", lambda: block().vjp(device(HOST))[1](HOST)),
    "ids": ("ids", lambda: table()(IDS, device(SHARES))),
    "coefficients of ids": ("coefficients of level 0", lambda: table()(device(IDS), SHARES)),
    "stored arrays": (
        r"factors\.\w+",
        lambda: tensormoe_cupy.MuMoE.restore(
            layer().config, tensormoe_numpy.MuMoE(8, 5, 4, rank=2).arrays
        ),
    ),
}


@pytest.mark.parametrize("name", ON_HOST)
def test_arrays_of_the_host_are_refused(name: str) -> None:
    what, call = ON_HOST[name]
    rule = rf"{what} must be an array of cupy; got numpy\.ndarray"
    with pytest.raises(BackendError, match=rule):
        call()


def test_numpys_layers_refuse_cupys_arrays() -> None:
    with pytest.raises(BackendError, match=r"x must be an array of numpy.*got cupy\.ndarray"):
        tensormoe_numpy.MuMoE(8, 5, 4, rank=2)(device(HOST))
    with pytest.raises(BackendError, match=r"cupy\.ndarray at 0, numpy\.ndarray at 1"):
        entmax(device(HOST), mask=HOST > 0)


MAKERS: dict[str, Callable[[], Any]] = {"layer": layer, "block": block, "embedding": table}


@pytest.mark.parametrize("devices", [None, 0], ids=["no driver", "no device"])
@pytest.mark.parametrize("name", MAKERS)
def test_without_a_device(
    name: str, devices: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    theirs = {
        "layer": tensormoe_numpy.MuMoE(8, 5, 4, rank=2),
        "block": tensormoe_numpy.MuMoEMLP(8, experts=4, rank=2),
        "embedding": tensormoe_numpy.MuMoEEmbedding(9, 5, 4, rank=2),
    }[name]
    theirs.save(tmp_path / "layer")
    kind = getattr(tensormoe_cupy, type(theirs).__name__)
    without = tensormoe_cupy.CupyBackend(Standin(devices), Special())
    for each in (tensormoe_cupy.MuMoE, tensormoe_cupy.MuMoEMLP, tensormoe_cupy.MuMoEEmbedding):
        monkeypatch.setattr(each, "backend", without)
    found = "cudaErrorInsufficientDriver" if devices is None else "no device"
    rule = f"must have an NVIDIA GPU and its driver; got: {found}.*take tensormoe_numpy"
    with pytest.raises(BackendError, match=rule):
        MAKERS[name]()
    with pytest.raises(BackendError, match=rule):
        kind.load(tmp_path / "layer")


def test_the_package_imports_without_a_driver() -> None:
    """And what is said where there is none comes from CuPy's own runtime."""
    program = (
        "import tensormoe_cupy, cupy\n"
        "try: found = cupy.cuda.runtime.getDeviceCount()\n"
        "except cupy.cuda.runtime.CUDARuntimeError: found = 0\n"
        "try: tensormoe_cupy.MuMoE(8, 4, 3, rank=2)\n"
        "except TypeError as error: print(type(error).__name__, not found)\n"
        "else: print('made', found > 0)\n"
    )
    roots = [str(Path(tensormoe_cupy.__file__).parents[1])]
    roots.append(str(Path(roots[0]).parent))
    environment = f"import sys; sys.path[:0] = {roots!r}\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", environment + program],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() in (["BackendError", "True"], ["made", "True"])


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "cupy" else real(name, *rest),
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensormoe_cupy"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingDependencyError, match=r"pip install 'tensormoe\[cupy\]'"):
        importlib.import_module("tensormoe_cupy")


def test_bfloat16(tmp_path: Path) -> None:
    path = tmp_path / "bfloat16"
    torch = pytest.importorskip("torch")
    save_checkpoint(path, "MuMoE", {}, {"a": torch.ones(2, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointError, match=r"cupy backend can't make an array 'a' of bfloat16"):
        read_checkpoint(path, ADAPTER)


@pytest.mark.skipif(ON_DEVICE, reason="values of a device may be anything there")
def test_ids_out_of_range_wrap_around() -> None:
    ids, far = device(np.array([1, 8])), device(np.array([10, -1]))
    shares = device(np.ones((2, 4), "float32"))
    made = table()
    np.testing.assert_array_equal(
        ADAPTER.to_host(made(far, shares)), ADAPTER.to_host(made(ids, shares))
    )


def test_restored_arrays_must_fit() -> None:
    config = layer().config
    arrays = layer().arrays
    with pytest.raises(CheckpointError, match=r"'factors\.bias' \(2,\) is missing"):
        tensormoe_cupy.MuMoE.restore(config, {k: a for k, a in arrays.items() if "bias" not in k})
    wide = {k: a.astype("float64") if "bias" in k else a for k, a in arrays.items()}
    with pytest.raises(ShapeError, match=r"one dtype of float16, .*; got float64 for"):
        tensormoe_cupy.MuMoE.restore(config, wide)
    whole = {k: a.astype("int32") for k, a in arrays.items()}
    with pytest.raises(ShapeError, match="got int32"):
        tensormoe_cupy.MuMoE.restore(config, whole)
    assert config.spec.factorization == CP(2)
