"""PyTorch layers under its compiler and exporters: whole graphs, any batch, equal results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tensormoe import CP, Factorization, Gate, TensorRing, TopK
from tensormoe_torch import MuMoE, MuMoEEmbedding, MuMoEMLP
from tests._kinds import UNEVEN
from tests.torch._helpers import randomized

# PyTorch's own tracers still call what PyTorch has deprecated
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]

GATES = [
    Gate(),
    Gate(alpha=1.3),
    Gate("entmax", alpha=2.5),
    Gate("sparsemax", normalization=None),
    Gate("softmax", bias=True),
    Gate("top_k", k=2),
    Gate(normalization="batch"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def traced(module: nn.Module, **options: Any) -> Any:
    """Compiled to a whole graph, which is then run as it is: what tracing can get wrong."""
    return torch.compile(module, fullgraph=True, backend="eager", **options)


def assert_same(module: nn.Module, compiled: Any, *inputs: Any) -> None:
    """Outputs and gradients of both are equal."""
    found = []
    for call in (module, compiled):
        module.zero_grad()
        given = [
            each.clone().requires_grad_() if isinstance(each, Tensor) and each.is_floating_point()
            else each
            for each in inputs
        ]  # fmt: skip
        output = call(*given)
        (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
        gradients = [p.grad for p in module.parameters()]
        gradients += [
            each.grad for each in given if isinstance(each, Tensor) and each.requires_grad
        ]
        found.append([output.detach(), *(g.clone() for g in gradients if g is not None)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", UNEVEN, ids=str)
def test_every_factorization_is_one_graph(kind: Factorization) -> None:
    layer = randomized(MuMoE(6, 5, (3, 2), kind, gate=Gate("softmax")))
    compiled = traced(layer, dynamic=True)
    for shape in ((4, 6), (6,)):
        assert_same(layer, compiled, torch.randn(shape))


def test_every_shape_is_one_graph() -> None:
    layer = randomized(MuMoE(6, 5, (3, 2), CP(3), gate=Gate()))
    compiled = traced(layer, dynamic=True)
    for shape in ((4, 6), (2, 3, 6), (6,)):
        assert_same(layer, compiled, torch.randn(shape))


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_every_gate_is_one_graph(gate: Gate) -> None:
    layer = randomized(MuMoE(6, 5, 4, CP(3), gate=gate)).eval()
    assert_same(layer, traced(layer, dynamic=True), torch.randn(4, 6))


def test_batch_norm_trains_compiled() -> None:
    gates = Gate(normalization="batch")
    layer, twin = (randomized(MuMoE(6, 5, 4, CP(3), gate=gates)) for _ in range(2))
    x = torch.randn(8, 6)
    torch.testing.assert_close(traced(twin)(x), layer(x), rtol=1e-4, atol=1e-5)
    for (name, want), got in zip(layer.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want, msg=name)


def test_blocks_embeddings_and_given_coefficients_are_one_graph() -> None:
    block = randomized(MuMoEMLP(6, 8, 5, experts=4, factorization="cp", rank=3))
    assert_same(block, traced(block), torch.randn(4, 6))
    table = randomized(MuMoEEmbedding(10, 6, 4, "tensor_ring", rank=2))
    ids, weights = torch.tensor([[1, 9, 0], [3, 3, 2]]), torch.rand(2, 3, 4)
    assert_same(table, traced(table), ids, weights)
    layer = randomized(MuMoE(6, 5, 4, CP(3), gate=None))
    indices = torch.stack([torch.randperm(4)[:2] for _ in range(3)])

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, values: Tensor) -> Tensor:
            output: Tensor = self.layer(x, TopK(indices, values))
            return output

    routed = Routed()
    assert_same(routed, traced(routed), torch.randn(3, 6), torch.rand(3, 2))


def test_one_compilation_a_regime() -> None:
    """Sizes within a regime share one graph; crossing a threshold adds one."""
    counter = torch._dynamo.testing.CompileCounter()
    layer = MuMoE(64, 48, 24, TensorRing((4, 4, 8)))
    starts = layer.config.regimes.starts
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    # a batch of one is always a graph of its own
    for batch in (*range(2, 40), 100, 1000, 333, 4096, 5000):
        compiled(torch.randn(batch, 64))
    seen = {layer.config.regimes.index(batch) for batch in (*range(2, 40), 100, 1000, 4096, 5000)}
    assert len(starts) >= len(seen)
    assert counter.frame_count <= len(seen)


def test_the_compiler_that_writes_code() -> None:
    """Through Inductor, with its generated kernels, forward and backward, at two batch sizes."""
    layer = randomized(MuMoE(6, 5, 4, CP(3)))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    assert_same(layer, compiled, torch.randn(5, 6))
    assert_same(layer, compiled, torch.randn(9, 6))


class Net(nn.Module):
    """A layer and a block in a row, whose gates need not be one."""

    def __init__(self, kind: Factorization, gate: Gate, other: Gate) -> None:
        super().__init__()
        self.layer = MuMoE(6, 8, (3, 2), kind, gate=gate)
        self.block = MuMoEMLP(8, 12, 5, experts=4, factorization="cp", rank=3, gate=other)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.block(self.layer(x))
        return output


@pytest.mark.parametrize(
    ("kind", "strict"),
    # strictly, calls are followed as they are by torch.compile, which has seen every one
    [*((kind, False) for kind in UNEVEN), *((kind, True) for kind in UNEVEN[::4])],
    ids=str,
)
def test_export_is_open_to_every_batch(kind: Factorization, strict: bool) -> None:
    """Once each way, the block has the gate that searches for its threshold: tracing it is slow."""
    searches = kind == UNEVEN[0]
    model = randomized(
        Net(kind, Gate("softmax"), Gate() if searches else Gate("top_k", k=2))
    ).eval()
    sizes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    program = torch.export.export(model, (torch.randn(3, 6),), dynamic_shapes=sizes, strict=strict)
    for batch in (1, 2, 17, 300):
        x = torch.randn(batch, 6)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("gate", "other"),
    [(Gate("softmax"), Gate()), (Gate("top_k", k=2), Gate("sparsemax"))],
    ids=str,
)
def test_onnx_runs_elsewhere(gate: Gate, other: Gate, tmp_path: Path) -> None:
    """Two gates in each model, as exporting one takes seconds."""
    import onnxruntime

    model = randomized(Net(TensorRing((2, 2, 2, 3)), gate, other)).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (torch.randn(3, 6),),
        path,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
        input_names=["x"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3, 50):
        x = torch.randn(batch, 6)
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-3, atol=1e-3)
