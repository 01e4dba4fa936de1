"""Every library in host memory gets what NumPy gets, in its own arrays; weights are not copied."""

from __future__ import annotations

import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from tensormoe import CP, Tucker
from tensormoe.backend import backend_of
from tensormoe.decomposition import Search, decompose
from tensormoe.decomposition._host import Workplace
from tensormoe.errors import ShapeError

QUICK = Search(starts=2, sweeps=8, polish=2)


@pytest.fixture
def stack(rng: np.random.Generator) -> np.ndarray:
    common = rng.standard_normal((1, 20, 14))
    return (common + rng.standard_normal((5, 20, 14))).astype("float32")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", [CP(6), Tucker((3, 6, 6)), "tensor_ring"], ids=str)
def test_tensors_get_what_arrays_get(kind: Any, dtype: str, stack: np.ndarray) -> None:
    """Bit for bit, biases and samples included."""
    rng = np.random.default_rng(1)
    arrays = {
        "weights": stack,
        "bias": rng.standard_normal((5, 14)),
        "inputs": rng.standard_normal((30, 20)),
        "coefficients": rng.dirichlet(np.full(5, 0.3), 30),
    }
    given = {name: array.astype(dtype) for name, array in arrays.items()}
    options: Any = {"budget": 0.4} if isinstance(kind, str) else {}
    wanted = decompose(factorization=kind, search=QUICK, weighted=True, **given, **options)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in given.items()}
    found = decompose(factorization=kind, search=QUICK, weighted=True, **tensors, **options)
    assert found.spec == wanted.spec
    for name, array in wanted.factors.items():
        assert isinstance(found.factors[name], torch.Tensor)
        assert found.factors[name].dtype == getattr(torch, dtype)
        np.testing.assert_array_equal(found.factors[name].numpy(), array)
    before, after = wanted.report.to_dict(), found.report.to_dict()
    assert before | {"seconds": 0} == after | {"seconds": 0}


def test_bfloat16_is_widened_as_it_is_read(stack: np.ndarray) -> None:
    given = torch.from_numpy(stack).bfloat16()
    wide = given.float().numpy()
    found = decompose(given, CP(6), search=QUICK, compare=False)
    assert {each.dtype for each in found.factors.values()} == {torch.bfloat16}
    read = {name: each.float().numpy() for name, each in found.factors.items()}
    rebuilt = np.einsum("nr,ir,or->nio", read["expert_0"], read["input"], read["output"])
    wanted = np.linalg.norm(rebuilt - wide) / np.linalg.norm(wide)
    assert found.report.error == pytest.approx(wanted, rel=1e-5)
    # rounding of the factors to eight bits costs little
    assert found.report.error < 1.02 * decompose(wide, CP(6), search=QUICK).report.error


def test_weights_are_lent_and_never_copied(rng: np.random.Generator) -> None:
    given = torch.from_numpy(rng.standard_normal((16, 192, 256)).astype("float32"))
    place = Workplace.of(given, backend_of(given))
    assert place.backend.name == "numpy"
    assert place.lend(given).ctypes.data == given.data_ptr()
    # strides are lent as well
    turned = given.transpose(1, 2)
    assert place.lend(turned).ctypes.data == given.data_ptr()
    constant = jnp.asarray(rng.standard_normal((3, 6, 5)), "float32")
    lent = Workplace.of(constant, backend_of(constant)).lend(constant)
    assert lent.ctypes.data == constant.unsafe_buffer_pointer()
    peaks = []
    for weights in (given.numpy(), given, given.bfloat16()):
        decompose(weights, CP(8), search=QUICK, compare=False)
        tracemalloc.start()
        decompose(weights, CP(8), search=QUICK, compare=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 0.8 * given.numpy().nbytes
    assert peaks[1] < 1.1 * peaks[0] + 2**16


def test_what_is_differentiated_is_cut_off(stack: np.ndarray) -> None:
    plain = decompose(torch.from_numpy(stack), CP(5), search=QUICK)
    leaf = torch.from_numpy(stack).requires_grad_()
    for given in (leaf, leaf * 1.0, nn.Parameter(torch.from_numpy(stack))):
        found = decompose(given, CP(5), search=QUICK)
        for name, array in found.factors.items():
            assert not array.requires_grad
            assert torch.equal(array, plain.factors[name])
    # factors are the caller's to train
    nn.Parameter(found.factors["input"]).sum().backward()


def test_experts_of_a_list(stack: np.ndarray) -> None:
    layers = [nn.Linear(20, 14, bias=False) for _ in range(5)]
    for layer, matrix in zip(layers, stack, strict=True):
        layer.weight.data.copy_(torch.from_numpy(matrix.T))
    found = decompose(torch.stack([each.weight.T for each in layers]), CP(5), search=QUICK)
    wanted = decompose(stack, CP(5), search=QUICK)
    assert found.report.error == pytest.approx(wanted.report.error, rel=1e-6)
    with pytest.raises(ShapeError, match=r"one array .*got a list of 5\. Stack them"):
        decompose([each.weight for each in layers], CP(5))


def test_jax_arrays_too(stack: np.ndarray) -> None:
    wanted = decompose(stack, CP(5), search=QUICK)
    found = decompose(jnp.asarray(stack), CP(5), search=QUICK)
    for name, array in found.factors.items():
        assert isinstance(array, jax.Array)
        assert array.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(array), wanted.factors[name])
    narrow = decompose(jnp.asarray(stack, jnp.bfloat16), CP(5), search=QUICK)
    assert {each.dtype for each in narrow.factors.values()} == {jnp.dtype("bfloat16")}
    assert narrow.report.error == pytest.approx(wanted.report.error, rel=0.02)


def test_bfloat16_of_jax_is_read_where_it_lies(stack: np.ndarray) -> None:
    given = jnp.asarray(stack, "bfloat16")
    lent = Workplace.of(given, backend_of(given)).lend(given)
    assert lent._host.ctypes.data == given.unsafe_buffer_pointer()
    part = lent[1:3]
    assert part.dtype == np.float32
    np.testing.assert_array_equal(part, np.asarray(given[1:3].astype("float32")))
    assert Workplace.of(stack, backend_of(stack)).lend(stack) is stack
    assert decompose(given, CP(4), search=QUICK, compare=False).factors["input"].dtype == "bfloat16"
