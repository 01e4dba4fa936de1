"""One file for two frameworks: what NumPy's layers write PyTorch's open, and the reverse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tensormoe_numpy
import tensormoe_torch
from tensormoe import CP, Dense, Gate, TensorRing
from tensormoe.checkpoint import peek_checkpoint
from tensormoe_torch import MuMoE, MuMoEEmbedding
from tests._torch_helpers import KINDS, numpy_of, randomize

TOLERANCES = {"float16": 2e-2, "float32": 1e-5, "float64": 1e-12}
BATCH = Gate(normalization="batch", bias=True, momentum=0.3)

# class name -> its arguments, the same in both frameworks
LAYERS: dict[str, list[dict[str, Any]]] = {
    "MuMoE": [
        *({"experts": (3, 2), "factorization": kind} for kind in KINDS),
        {"experts": 5, "factorization": CP(3), "bias": False, "gate": Gate("top_k", k=2)},
        {"experts": (3, 2, 2), "factorization": TensorRing(2), "gate": BATCH},
        {"experts": 4, "factorization": Dense(), "gate": None},
    ],
    "MuMoEMLP": [
        {"experts": (3, 2), "factorization": (CP(2), TensorRing(2)), "act_layer": name}
        for name in ("gelu", "gelu_tanh", "relu", "silu", "tanh")
    ]
    + [
        {"experts": 4, "factorization": CP(3), "gate": BATCH, "drop": 0.5, "bias": False},
        {"experts": 4, "factorization": CP(3), "gate": None},
    ],
    "MuMoEEmbedding": [{"experts": (3, 2), "factorization": kind} for kind in KINDS],
}
CASES = [
    pytest.param(name, options, id=f"{name}{place}")
    for name, cases in LAYERS.items()
    for place, options in enumerate(cases)
]


def make(module: Any, name: str, options: dict[str, Any], dtype: Any) -> Any:
    sizes = (6, 8, 5) if name == "MuMoEMLP" else (6, 5)
    return getattr(module, name)(*sizes, **options, dtype=dtype)


def randomize_numpy(layer: Any) -> Any:
    rng = np.random.default_rng(0)
    for array in layer.parameters.values():
        array[...] = rng.standard_normal(array.shape)
    for name, array in layer.buffers.items():
        array[...] = rng.uniform(0.5, 2, array.shape) * (1 if "variance" in name else 0.1)
    return layer


def run(layer: Any, name: str, options: dict[str, Any], dtype: str) -> np.ndarray:
    """The output of a layer of either framework, in inference."""
    on_torch = isinstance(layer, torch.nn.Module)
    convert = torch.tensor if on_torch else np.asarray
    if on_torch:
        layer.eval()
    rng = np.random.default_rng(1)
    x = rng.standard_normal((7, 6)).astype(dtype)
    ids = rng.integers(6, size=7)
    experts = options["experts"]
    made = [
        rng.standard_normal((7, count)).astype(dtype)
        for count in (experts if isinstance(experts, tuple) else (experts,))
    ]
    ready = name == "MuMoEEmbedding" or options.get("gate", "entmax") is None
    arguments = [ids if name == "MuMoEEmbedding" else x]
    given = [convert(each) for each in made] if ready else None
    output = layer(*(convert(each) for each in arguments), given)
    return numpy_of(output) if on_torch else output


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("name", "options"), CASES)
class TestBothWays:
    def close(self, got: np.ndarray, want: np.ndarray, dtype: str) -> None:
        assert got.dtype == want.dtype == dtype
        size = float(np.max(np.abs(want)))
        tolerance = TOLERANCES[dtype]
        np.testing.assert_allclose(
            got.astype(float), want.astype(float), rtol=0, atol=tolerance * max(size, 1.0)
        )

    def test_written_by_numpy(
        self, name: str, options: dict[str, Any], dtype: str, tmp_path: Path
    ) -> None:
        layer = randomize_numpy(make(tensormoe_numpy, name, options, dtype))
        layer.save(tmp_path / "layer")
        again = getattr(tensormoe_torch, name).load(tmp_path / "layer")
        assert again.config == layer.config
        assert again.dtype == getattr(torch, dtype)
        held = {**layer.parameters, **layer.buffers}
        assert held.keys() == again.state_dict().keys()
        for key, tensor in again.state_dict().items():
            np.testing.assert_array_equal(numpy_of(tensor), held[key], strict=True)
        self.close(run(again, name, options, dtype), run(layer, name, options, dtype), dtype)

    def test_written_by_pytorch(
        self, name: str, options: dict[str, Any], dtype: str, tmp_path: Path
    ) -> None:
        layer = randomize(make(tensormoe_torch, name, options, getattr(torch, dtype)))
        layer.save(tmp_path / "layer")
        again = getattr(tensormoe_numpy, name).load(tmp_path / "layer")
        assert again.config == layer.config
        assert again.dtype == dtype
        held = {**again.parameters, **again.buffers}
        assert held.keys() == layer.state_dict().keys()
        for key, tensor in layer.state_dict().items():
            np.testing.assert_array_equal(held[key], numpy_of(tensor), strict=True)
        self.close(run(again, name, options, dtype), run(layer, name, options, dtype), dtype)

    def test_the_same_bytes(
        self, name: str, options: dict[str, Any], dtype: str, tmp_path: Path
    ) -> None:
        """There and back again, nothing has changed."""
        first, second = tmp_path / "first", tmp_path / "second"
        randomize(make(tensormoe_torch, name, options, getattr(torch, dtype))).save(first)
        getattr(tensormoe_numpy, name).load(first).save(second)
        assert second.read_bytes() == first.read_bytes()


def test_bfloat16_is_kept(tmp_path: Path) -> None:
    layer = randomize(MuMoE(6, 5, 4, CP(3), gate=BATCH, dtype=torch.bfloat16))
    layer.save(tmp_path / "layer")
    dtypes = {name: info.dtype for name, info in peek_checkpoint(tmp_path / "layer").arrays.items()}
    assert {dtypes[name] for name in dtypes if "running" not in name} == {"bfloat16"}
    assert {dtypes[name] for name in dtypes if "running" in name} == {"float32"}
    again = MuMoE.load(tmp_path / "layer")
    for name, tensor in layer.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(again.state_dict()[name], tensor)


def test_trained_after_loading(tmp_path: Path) -> None:
    """What is loaded are parameters of its own, and nothing of the file's."""
    layer = randomize(MuMoE(6, 5, 4, CP(3)))
    layer.save(tmp_path / "layer")
    content = (tmp_path / "layer").read_bytes()
    again = MuMoE.load(tmp_path / "layer")
    again(torch.ones(3, 6)).sum().backward()
    torch.optim.SGD(again.parameters(), lr=0.1).step()
    assert (tmp_path / "layer").read_bytes() == content
    assert not torch.equal(again.factors["input"], layer.factors["input"])


def test_frozen_and_transposed_parameters_are_written_as_they_are(tmp_path: Path) -> None:
    table = randomize(MuMoEEmbedding(6, 5, 4, CP(3)))
    table.requires_grad_(False)
    turned = table.factors["input"].t().contiguous().t()
    table.factors["input"] = torch.nn.Parameter(turned, requires_grad=False)
    assert not table.factors["input"].is_contiguous()
    table.save(tmp_path / "table")
    assert torch.equal(MuMoEEmbedding.load(tmp_path / "table").factors["input"], turned)


def test_pytorchs_safetensors_read_it_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    layer = randomize(MuMoE(6, 5, (3, 2), CP(3), gate=BATCH))
    layer.save(tmp_path / "layer")
    found = load_file(tmp_path / "layer")
    assert found.keys() == layer.state_dict().keys()
    assert all(torch.equal(found[name], each) for name, each in layer.state_dict().items())
    again = MuMoE.of(layer.config)
    again.load_state_dict(found)
    assert torch.equal(again.eval()(torch.ones(2, 6)), layer.eval()(torch.ones(2, 6)))
