"""The stand-in is strict, and the adapter and the layers use nothing that CuPy lacks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tensormoe_numpy
from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Gate,
    Hadamard,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    TopK,
    Tucker,
    gates,
)
from tests._cupy_standin import (
    ADAPTER,
    LOG,
    ON_DEVICE,
    Special,
    Standin,
    device,
    installed,
    randomize,
    twin,
    waits,
)

cupy = pytest.importorskip("cupy")
tensormoe_cupy = pytest.importorskip("tensormoe_cupy")

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="the tests run on CuPy itself")

KINDS = [
    CP(3),
    TensorRing(3),
    TensorTrain((2, 3, 4)),
    Tucker(2),
    SharedBasis((2, 3)),
    BaseDelta(2),
    SharedDelta(2),
    Hadamard(),
    Dense(),
]
XP = Standin()


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    with installed():
        yield


def array(*shape: int) -> Any:
    return XP.asarray(np.ones(shape))


REFUSED: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
    "no such function": (AttributeError, lambda: XP.vecdot),
    "no such method": (AttributeError, lambda: array(2).cumulative_sum),
    "NumPy's private method": (AttributeError, lambda: array(2).__array_interface__),
    "no such keyword": (TypeError, lambda: XP.arange(3, device=None)),
    "no such keyword of a ufunc": (TypeError, lambda: XP.maximum(array(2), 0.0, where=True)),
    "no such keyword of a reduction": (TypeError, lambda: XP.max(array(2), initial=0.0)),
    "no such keyword of a method": (TypeError, lambda: array(2).sum(initial=0.0)),
    "too many arguments": (TypeError, lambda: XP.isfinite(array(2), array(2), array(2))),
    "a list": (TypeError, lambda: XP.sum([1.0, 2.0])),
    "a list of arrays of NumPy": (TypeError, lambda: XP.concat([array(2), np.ones(2)])),
    "an array of NumPy": (TypeError, lambda: XP.exp(np.ones(2))),
    "an operand of NumPy": (TypeError, lambda: array(2) + np.ones(2)),
    "an operand of NumPy before it": (TypeError, lambda: np.ones(2) + array(2)),
    "a comparison with NumPy": (TypeError, lambda: array(2) == np.ones(2)),
    "an index of NumPy": (TypeError, lambda: array(2)[np.array([0])]),
    "a list as index": (TypeError, lambda: array(2)[[0]]),
    "conversion": (TypeError, lambda: np.asarray(array(2))),
    "a function of NumPy": (TypeError, lambda: np.sum(array(2))),
    "a ufunc of NumPy": (TypeError, lambda: np.exp(array(2))),
    "an index made of it": (TypeError, lambda: range(array(1).sum())),
    "atomics that CUDA lacks": (
        TypeError,
        lambda: XP.add.at(XP.zeros(3, dtype="int64"), XP.asarray(0), 1),
    ),
    "no such special function": (AttributeError, lambda: Special().no_such_function),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses(name: str) -> None:
    error, call = REFUSED[name]
    with pytest.raises(error):
        call()


def test_results_without_axes_are_arrays() -> None:
    x = array(2, 3)
    for found in (XP.sum(x), x.max(), x[0, 0], XP.mean(x), x.sum() + 1.0, -x.sum()):
        assert isinstance(found, XP.ndarray)
        assert found.shape == ()
    with waits() as found:
        float(x.sum()), bool(x[0, 0]), int(x[0, 0]), x.tolist(), x[x > 0], XP.nonzero(x)
    assert found == ["float", "bool", "int", "tolist", "__getitem__", "nonzero"]


def test_everything_used_is_cupys() -> None:
    """Every function, method and keyword that a tour of the library uses is in the package."""
    LOG.used.clear()
    tour()
    names = {name for kind, name, _ in LOG.used if kind == "function"}
    assert {"matmul", "sum", "where", "add.at", "take", "asarray", "asnumpy", "concat"} <= names
    owners = {"function": cupy, "method": cupy.ndarray, "special": special()}
    for kind, name, keywords in sorted(LOG.used, key=str):
        first, *rest = name.split(".")
        real = getattr(owners[kind], first)
        for each in rest:
            real = getattr(real, each)
        known = arguments(real)
        assert keywords <= known, f"{kind} {name} takes {known}, not {keywords - known}"


def special() -> Any:
    from cupyx.scipy import special as found

    return found


def arguments(real: Any) -> set[str]:
    """Names of arguments: Python's own, or all words of the first line of the documentation."""
    try:
        return set(inspect.signature(real).parameters)
    except (TypeError, ValueError):
        head = (real.__doc__ or "").strip().partition("\n")[0]
        return {part.partition("=")[0].strip(" )*\\") for part in head.partition("(")[2].split(",")}


def tour() -> None:
    """Every layer, gate, loss and layout once."""
    rng = np.random.default_rng(0)
    x = device(rng.standard_normal((5, 6)))
    for kind in KINDS:
        for gate in (Gate(), Gate("top_k", k=12), Gate(alpha=1.25, bias=True), Gate(alpha=3.0)):
            layer = twin(
                randomize(tensormoe_numpy.MuMoE(6, 5, (20, 13), kind, gate=gate, dtype="float64"))
            )
            output, pull = layer.vjp(x)
            pull(output)
            layer.prepare()(x)
            layer.expert(1, 2)
            layer.materialize()
    for gate in (Gate("softmax"), Gate("sparsemax"), Gate("top_k", k=2, normalization="batch")):
        block = tensormoe_cupy.MuMoEMLP(6, experts=8, gate=gate, drop=0.5, dtype="float64")
        output, pull = block.vjp(x)
        tensormoe_cupy.Adam(block.parameters, weight_decay=0.1).step(pull(output).parameters)
    for act_layer in ("gelu", "gelu_tanh", "relu", "silu", "tanh"):
        narrow = tensormoe_cupy.MuMoEMLP(6, act_layer=act_layer, experts=8, dtype="float16")
        output, pull = narrow.vjp(x.astype("float16"))
        pull(output)
    table = tensormoe_cupy.MuMoEEmbedding(9, 5, (3, 2), dtype="float64")
    ids = device(np.array([0, 8, 3, 3, 1], "int16"))
    made = device([rng.random((5, 3)), rng.random((5, 2))])
    output, pull = table.vjp(ids, made)
    pull(output)
    chosen = gates.top_k_indices(x, 2)
    gates.top_k_indices_vjp(chosen, chosen.values, 6)
    assert isinstance(chosen, TopK)
    weights = gates.softmax(x, mask=x > -1.0)
    for measure in (gates.load_balance_loss, gates.entropy_loss, gates.expert_load):
        measure(weights)
    gates.load_balance_loss_vjp(weights)
    gates.entropy_loss_vjp(weights)
    ADAPTER.from_bytes(*ADAPTER.to_bytes(x))
