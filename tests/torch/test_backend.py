"""PyTorch's adapters keep the contract: the one that is traced, and the one that is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tensormoe import backend_of, entmax
from tensormoe.backend import Backend, _registry
from tensormoe.errors import BackendError
from tensormoe.gates import Gate, Statistics, activate, activate_vjp
from tensormoe.testing import BackendContract, gates
from tensormoe_torch import BACKEND, TorchBackend
from tensormoe_torch._adapter import EAGER

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class OnTensors(BackendContract):
    def from_numpy(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array)

    def to_numpy(self, array: Tensor) -> np.ndarray:
        return array.detach().numpy()


class TestGeneral(OnTensors):
    backend = BACKEND


class TestDifferentiated(OnTensors):
    """Autograd records every operation, and finds nothing written to that it needs."""

    backend = BACKEND

    def from_numpy(self, array: np.ndarray) -> Tensor:
        tensor = torch.tensor(array)
        return tensor.requires_grad_() if tensor.is_floating_point() else tensor


class OnPlainTensors(OnTensors):
    """The adapter of the layers' own nodes, which is not the registered one."""

    def test_the_adapter_is_found(self) -> None:
        assert isinstance(self.backend, Backend)
        assert self.backend.eager is True
        assert _registry.get_backend("torch") is not self.backend
        assert self.backend.owns(torch.ones(2))
        assert not self.backend.owns(np.ones(2))


class TestEager(OnPlainTensors):
    backend = EAGER


def _in_small_blocks() -> TorchBackend:
    backend = TorchBackend(eager=True)
    backend.row_block_bytes = 100
    return backend


class TestEagerInBlocks(OnPlainTensors):
    """An odd size, so that gates work on several blocks even where arrays are small."""

    backend = _in_small_blocks()


def test_it_is_the_registered_one() -> None:
    assert backend_of(torch.ones(2), torch.nn.Parameter(torch.ones(2))) is BACKEND
    assert BACKEND.eager is False
    assert repr(BACKEND) == "TorchBackend(eager=False)"


def test_what_is_mixed_is_listed() -> None:
    with pytest.raises(BackendError, match=r"torch\.Tensor at 0, numpy\.ndarray at 1"):
        backend_of(torch.ones(2), np.ones(2))


@pytest.mark.parametrize("backend", [BACKEND, EAGER], ids=repr)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32, torch.int64, torch.bool], ids=str)
def test_bytes_of_every_dtype(backend: TorchBackend, dtype: torch.dtype) -> None:
    for tensor in (torch.arange(6).reshape(2, 3).to(dtype), torch.ones((), dtype=dtype)):
        name, shape, content = backend.to_bytes(tensor)
        assert len(content) == tensor.nbytes
        again = backend.from_bytes(name, shape, content)
        assert again.dtype == dtype
        assert torch.equal(again, tensor)


def test_bytes_are_row_major_whatever_the_layout() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    turned = tensor.t().contiguous().t()
    assert not turned.is_contiguous()
    assert BACKEND.to_bytes(turned) == BACKEND.to_bytes(tensor)
    part = torch.arange(12.0).reshape(2, 6)[:, ::2]
    assert BACKEND.to_bytes(part) == BACKEND.to_bytes(part.clone())


def test_bytes_of_nothing() -> None:
    again = BACKEND.from_bytes(*BACKEND.to_bytes(torch.ones(2, 0)))
    assert again.shape == (2, 0)
    assert again.dtype == torch.float32


@given(data=st.data())
def test_autograd_finds_the_closed_forms(data: st.DataObject) -> None:
    """The general adapter's gates differentiate to what ``activate_vjp`` says they do."""
    count = data.draw(st.integers(1, 12), "experts")
    gate: Gate = data.draw(gates((count,), batch_norm=True), "gate")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    logits = torch.tensor(rng.standard_normal((5, count)), requires_grad=True)
    kept = Statistics(*torch.tensor(rng.uniform(0.5, 2, (2, count))))
    options: Any = {"statistics": kept, "training": data.draw(st.booleans(), "training")}
    upstream = torch.tensor(rng.standard_normal((5, count)))
    coefficients = activate(gate, logits, **options).coefficients
    (got,) = torch.autograd.grad(coefficients, logits, upstream)
    for backend in (BACKEND, EAGER):
        plain = logits.detach()
        made = activate(gate, plain, backend=backend, **options).coefficients
        want = activate_vjp(gate, plain, made, upstream, backend=backend, **options)
        size = max(1.0, float(want.abs().max()))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * size)


@pytest.mark.parametrize("backend", [BACKEND, EAGER], ids=repr)
def test_nan_stays_in_its_row(backend: TorchBackend) -> None:
    """No error, as everywhere in PyTorch; the other inputs of the batch are none the worse."""
    logits = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = activate(Gate(), logits, backend=backend).coefficients
    logits[1, 2] = torch.nan
    found = activate(Gate(), logits, backend=backend).coefficients
    assert found[1].isnan().any()
    rest = [0, 2, 3]
    torch.testing.assert_close(found[rest], whole[rest], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", [BACKEND, EAGER], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_types(backend: TorchBackend, dtype: torch.dtype) -> None:
    """The primitives keep them; the contract's random layers would overflow."""
    array = torch.arange(12.0).reshape(3, 4).to(dtype)
    indices = torch.tensor([2, 0, 2])
    picked = backend.take(array, indices, 0)
    found = [
        (backend.matmul(array, array.T), array.float() @ array.T.float()),
        (backend.sum(array, (0,)), array.float().sum(0)),
        (backend.row_sums(array), array.float().sum(-1, keepdim=True)),
        (backend.square_sums(array), (array.float() ** 2).sum(-1, keepdim=True)),
        (picked, array.float()[indices]),
        (backend.scatter_add(picked, indices, 0, 3), array.float() * torch.tensor([[1], [0], [2]])),
        (backend.namespace.concat([array, picked]), torch.cat([array, array[indices]]).float()),
        (backend.contiguous(backend.permute(array, (1, 0))), array.T.float()),
    ]
    for got, want in found:
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_entmax_is_float32_at_least(dtype: torch.dtype) -> None:
    found = entmax(torch.tensor([[2.0, 1.0, -1.0, -2.0]], dtype=dtype))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = torch.tensor([[0.8307, 0.1693, 0.0, 0.0]], dtype=found.dtype)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-4)


def test_kinds_of_dtypes() -> None:
    isdtype = BACKEND.namespace.isdtype
    assert isdtype(torch.bfloat16, "real floating")
    assert not isdtype(torch.complex64, "real floating")
    assert isdtype(torch.uint8, "integral")
    assert not isdtype(torch.bool, "integral")
    assert isdtype(torch.bool, "bool")
    with pytest.raises(ValueError, match="kind must be 'bool', 'real floating' or 'integral'"):
        isdtype(torch.float32, "numeric")
