"""What the tests of the PyTorch layers share: layers with random values, and the traced way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tensormoe import Gate, LayerSpec
from tensormoe.testing import assert_output, reconstruct_by_einsum
from tensormoe_torch import MuMoE, MuMoEEmbedding, MuMoEMLP


def numpy_of(tensor: Tensor) -> np.ndarray:
    """The values, whatever follows the tensor; bfloat16, which NumPy lacks, in float32."""
    values = tensor.detach()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def factors_of(layer: Any) -> dict[str, np.ndarray]:
    """The factors by their short names, as the oracle takes them."""
    return {name: numpy_of(array) for name, array in layer.factors.items()}


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> Any:
    """Random parameters, those of the gate included, which start at zero, and statistics."""
    rng = np.random.default_rng(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.tensor(rng.standard_normal(tuple(parameter.shape))))
    for name, buffer in module.named_buffers():
        scale = 1.0 if "variance" in name else 0.1
        buffer.copy_(torch.tensor(rng.uniform(0.5, 2.0, tuple(buffer.shape)) * scale))
    return module


def randomized(module: nn.Module, seed: int = 0) -> Any:
    """Random parameters below one on the whole, the gate's included, which start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return module


def build(
    spec: LayerSpec, gate: Gate | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
) -> MuMoE:
    """A layer of random values."""
    layer: MuMoE = randomize(
        MuMoE(
            spec.in_features,
            spec.out_features,
            spec.experts,
            spec.factorization,
            bias=spec.bias,
            gate=gate,
            dtype=dtype,
        ),
        seed,
    )
    return layer


def layer(experts: Any = 3, **options: Any) -> MuMoE:
    """A small layer, 8 → 4."""
    return MuMoE(8, 4, experts, **({"factorization": "cp", "rank": 2} | options))


def table(**options: Any) -> MuMoEEmbedding:
    return MuMoEEmbedding(9, 4, 3, **({"rank": 2} | options))


def block(**options: Any) -> MuMoEMLP:
    return MuMoEMLP(8, **({"experts": 3, "rank": 2} | options))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal values."""
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


@contextmanager
def traced() -> Iterator[None]:
    """Layers take the way that transformations of PyTorch follow, whatever they are given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tensormoe_torch._autograd.is_traced", lambda x: True)
        yield


WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "without gradients": torch.no_grad,
    "in inference": torch.inference_mode,
    "with gradients": torch.enable_grad,
    "traced": traced,
}
"""The ways that a call may run: operation by operation, as nodes of the graph, traced."""


def assert_mixture(output: Tensor, layer: Any, made: Any, x: Tensor) -> None:
    """Factorized equals unfactorized, for given coefficients."""
    assert_output(
        numpy_of(output),
        layer.spec.factorization,
        factors_of(layer),
        [numpy_of(each) for each in made],
        numpy_of(x),
    )


def gradients(output: Tensor, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the sum of squares of an output, zero where nothing depends on a source."""
    found = torch.autograd.grad(
        (output.double() ** 2).sum(), list(sources.values()), allow_unused=True
    )
    return {
        name: torch.zeros_like(source) if grad is None else grad
        for (name, source), grad in zip(sources.items(), found, strict=True)
    }


def weights(layer: Any) -> np.ndarray:
    """𝒲 with the bias as its last row, built by code of its own; a copy, as Dense is 𝒲 itself."""
    return np.array(reconstruct_by_einsum(layer.spec.factorization, factors_of(layer)))


def assert_near(found: Any, wanted: Any, tolerance: float = 1e-11) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0.0, atol=tolerance * np.abs(wanted).max())


def put(array: np.ndarray, level: int, place: int, values: Any) -> np.ndarray:
    """A copy with the slice of one expert of one level changed."""
    changed = np.array(array)
    np.moveaxis(changed, level, 0)[place] = values
    return changed


def pick(array: np.ndarray, level: int, place: int) -> np.ndarray:
    return np.take(array, place, axis=level)
