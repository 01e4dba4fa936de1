"""The gate's activation as one operator under ``torch.compile``, and where it is none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import checkpoint

from tensormoe import Gate
from tensormoe.gates import activate
from tensormoe_torch import MuMoE, MuMoEMLP
from tensormoe_torch._adapter import BACKEND
from tests.torch._helpers import normal, randomize
from tests.torch._ranks import Ranks

# PyTorch's own tracers still call what PyTorch has deprecated
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]

ACTIVATIONS: list[dict[str, Any]] = [
    {"activation": "entmax"},
    {"activation": "entmax", "alpha": 1.3},
    {"activation": "entmax", "alpha": 2.5},
    {"activation": "sparsemax"},
    {"activation": "softmax", "bias": True},
    {"activation": "top_k", "k": 2},
]
GATES = [
    Gate(**each, normalization=norm) for each in ACTIVATIONS for norm in ("layer", "batch", None)
]
PLAIN = [gate for gate in GATES if gate.normalization != "batch"]
FORWARD, BACKWARD = "tensormoe.activate.default", "tensormoe.activate_vjp.default"

Call = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A compiler that runs graphs as they are, and keeps the names of what they call."""

    def __init__(self) -> None:
        self.forward: list[str] = []
        self.backward: list[str] = []
        keep = [partial(self._keep, names) for names in (self.forward, self.backward)]
        self.backend = aot_autograd(fw_compiler=keep[0], bw_compiler=keep[1])

    def compiled(self, call: Any, **options: Any) -> Any:
        return torch.compile(call, backend=self.backend, fullgraph=True, **options)

    def has_operator(self) -> bool:
        return any(name.startswith("tensormoe") for name in self.forward + self.backward)

    @staticmethod
    def _keep(names: list[str], graph: torch.fx.GraphModule, _: Any) -> Any:
        names += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        return make_boxed_func(graph)


def layer(gate: Gate, dtype: torch.dtype = torch.float64) -> MuMoE:
    return randomize(MuMoE(6, 5, 4, rank=3, gate=gate, dtype=dtype))


def run(call: Any, module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients of input and parameters."""
    x = x.clone().requires_grad_()
    output: Tensor = call(x)
    cotangent = torch.linspace(-1, 1, output.numel()).to(output).reshape(output.shape)
    return [output, *torch.autograd.grad(output, [x, *module.parameters()], cotangent)]


def assert_same(found: Any, wanted: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_contract_of_operators(gate: Gate) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = normal(5, 4, dtype=dtype).requires_grad_()
        torch.library.opcheck(torch.ops.tensormoe.activate.default, (logits, gate.text))
    logits = normal(5, 4)
    made = torch.ops.tensormoe.activate(logits, gate.text)
    arguments = (logits, made, normal(5, 4, seed=1), gate.text)
    torch.library.opcheck(torch.ops.tensormoe.activate_vjp.default, arguments)


@pytest.mark.parametrize(
    ("gate", "training"),
    [(gate, False) for gate in GATES] + [(gate, True) for gate in GATES if gate not in PLAIN],
    ids=str,
)
def test_one_operator_each_way_and_equal_results(gate: Gate, training: bool) -> None:
    module = layer(gate).train(training)
    twin = layer(gate).train(training)
    graphs = Graphs()
    x = normal(7, 6)
    assert_same(run(graphs.compiled(twin), twin, x), run(module, module, x), 1e-12)
    assert graphs.forward.count(FORWARD) == 1
    assert graphs.backward.count(BACKWARD) == 1
    assert_same(list(twin.buffers()), list(module.buffers()), 1e-12)


@pytest.mark.parametrize("gate", PLAIN, ids=str)
def test_nothing_else_is_in_the_graph(gate: Gate) -> None:
    graphs = Graphs()
    assert layer(gate).gate is not None
    with torch.no_grad():
        graphs.compiled(layer(gate).gate)(normal(7, 6))
    products = {"aten.mm.default", "aten.add.Tensor"} if gate.bias else {"aten.mm.default"}
    assert sorted(set(graphs.forward) - {"aten.detach.default"}) == [*sorted(products), FORWARD]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [None, True])
def test_dtypes_and_any_batch(dtype: torch.dtype, dynamic: bool | None) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    block = randomize(MuMoEMLP(6, 7, 5, experts=4, rank=3, dtype=dtype))
    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=dynamic)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-6
    made = []
    for batch in (4, 9, 30, 17):
        x = normal(batch, 6, dtype=dtype)
        if dynamic is None:
            torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            assert_same(compiled(x), block(x), tolerance)
        made.append(counter.frame_count)
    assert len(set(made)) == 1, "nothing is compiled again"


def test_gradients_of_any_batch() -> None:
    module = layer(Gate())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (5, 2, 0, 40):
        x = normal(batch, 6)
        assert_same(run(compiled, module, x), run(module, module, x), 1e-12)


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_infinite_and_missing_values(gate: Gate) -> None:
    """As in eager mode: an expert may be excluded, and NaN spoils its token alone."""
    module = layer(gate).eval()
    assert module.gate is not None
    x = normal(6, 6)
    x[1] = torch.nan
    x[2] = torch.inf
    compiled = torch.compile(module.gate, fullgraph=True, backend="aot_eager")
    (found,), (wanted,) = compiled(x), module.gate(x)
    torch.testing.assert_close(found, wanted, equal_nan=True)
    assert found[1].isnan().all()
    assert found[[0, 3, 4, 5]].isfinite().all()


# each activation and each normalization: tracing a search takes seconds, and is that of the
# activation whatever was normalized before
@pytest.mark.parametrize("gate", [GATES[turn % 3 + 3 * turn] for turn in range(6)], ids=str)
def test_exporters_see_operations(gate: Gate) -> None:
    module = layer(gate, torch.float32).eval()
    for strict in (False, True):
        program = torch.export.export(module, (normal(3, 6, dtype=torch.float32),), strict=strict)
        assert "tensormoe" not in str(program.graph)


def _vmapped(call: Call) -> Call:
    return torch.vmap(lambda x: call(x))  # without a name that is the module's text


def _differentiated(call: Call) -> Call:
    return torch.func.grad(lambda x: call(x).square().sum())


def _forward(call: Call) -> Call:
    return lambda x: torch.func.jvp(call, (x,), (torch.ones_like(x),))[1]


def _dual(call: Call) -> Call:
    def run(x: Tensor) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            found: Any = torch.autograd.forward_ad.unpack_dual(call(dual))
            return found.tangent.clone()

    return run


@pytest.mark.parametrize("transform", [_vmapped, _differentiated, _forward, _dual])
@pytest.mark.parametrize("gate", [Gate(), Gate("top_k", k=2)], ids=str)
def test_transformations_see_operations(gate: Gate, transform: Callable[[Call], Call]) -> None:
    module, graphs = layer(gate), Graphs()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    x = normal(4, 6)
    call = transform(module)
    assert_same(graphs.compiled(call)(x), call(x), 1e-9)
    assert graphs.forward
    assert not graphs.has_operator()


def test_other_devices_see_operations() -> None:
    """Which a compiler fuses; here it has no values at all."""
    graphs = Graphs()
    with torch.no_grad():
        graphs.compiled(layer(Gate()).to("meta"))(torch.empty(3, 6, device="meta").double())
    assert graphs.forward
    assert not graphs.has_operator()


@pytest.mark.parametrize("gate", PLAIN, ids=str)
def test_kernel_for_other_devices(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    def both() -> list[Tensor]:
        logits = normal(5, 4).requires_grad_()
        made = torch.ops.tensormoe.activate(logits, gate.text)
        return [made, *torch.autograd.grad(made, logits, normal(5, 4, seed=1))]

    wanted = both()
    monkeypatch.setattr("tensormoe_torch._operator.direct", lambda x: BACKEND)
    assert_same(both(), wanted, 1e-12)


@pytest.mark.parametrize("gate", PLAIN, ids=str)
def test_second_derivatives(gate: Gate) -> None:
    """Where the graph of a backward pass is wanted, it consists of operations."""

    def twice(call: Call) -> Tensor:
        x = normal(5, 4).requires_grad_()
        (first,) = torch.autograd.grad((call(x) ** 3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * normal(5, 4, seed=1)).sum(), x)
        return second

    def plain(x: Tensor) -> Tensor:
        return activate(gate, x, backend=BACKEND).coefficients

    assert_same(twice(lambda x: torch.ops.tensormoe.activate(x, gate.text)), twice(plain), 1e-12)


def test_compiled_second_derivatives() -> None:
    module, x = layer(Gate()), normal(4, 6).requires_grad_()

    def twice(call: Any) -> Tensor:
        (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return second

    assert_same(twice(torch.compile(module, fullgraph=True, backend="eager")), twice(module), 1e-9)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        twice(torch.compile(module, fullgraph=True, backend="aot_eager"))


@pytest.mark.parametrize("gate", [Gate(), Gate(normalization="batch")], ids=str)
def test_checkpointing(gate: Gate) -> None:
    module = layer(gate).eval()

    def saving(x: Tensor) -> Tensor:
        output: Tensor = checkpoint(module, x, use_reentrant=False)
        return output

    compiled = torch.compile(saving, fullgraph=True, backend="aot_eager")
    x = normal(5, 6)
    assert_same(run(compiled, module, x), run(module, module, x), 1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("inside", [False, True], ids=["ends before", "holds"])
def test_autocast(backend: str, inside: bool) -> None:
    """Also where it still holds in the backward pass."""
    module = layer(Gate(), torch.float32)
    x = normal(5, 6, dtype=torch.float32)
    around: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16)

    def narrow(call: Any) -> Call:
        def run(x: Tensor) -> Tensor:
            with nullcontext() if inside else torch.autocast("cpu", torch.bfloat16):
                output: Tensor = call(x)
                return output

        return run

    assert module.gate is not None
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    weights = torch.compile(module.gate, fullgraph=True, backend=backend)
    with around if inside else nullcontext():
        assert_same(run(narrow(compiled), module, x), run(narrow(module), module, x), 0.05)
        assert_same(weights(x)[0], module.gate(x)[0])


def sharded(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    x = normal(8, 6)[4 * rank : 4 * rank + 4]
    plain, module = layer(Gate()), layer(Gate())
    fully_shard(module)
    compiled = torch.compile(module, backend="aot_eager")
    output = compiled(x)
    output.square().mean().backward()
    torch.testing.assert_close(output, plain(x))
    plain(normal(8, 6)).square().mean().backward()
    for (name, want), got in zip(plain.named_parameters(), module.parameters(), strict=True):
        assert got.grad is not None
        torch.testing.assert_close(got.grad.full_tensor(), want.grad, msg=name)


def test_sharded(ranks: Ranks) -> None:
    ranks(sharded)


_CHILD = """
import importlib
import torch
import torch._dynamo.testing
import tensormoe_torch
from tensormoe_torch import MuMoE, _operator
for _ in range(2):
    importlib.reload(_operator)
torch.manual_seed(0)
layer = MuMoE(6, 5, 4, rank=3)
torch.nn.init.normal_(layer.gate.projection_0)
x = torch.randn(3, 6)
# a product and the operator: nothing that a C++ compiler would be called for
with torch.no_grad():
    torch.testing.assert_close(torch.compile(layer.gate, fullgraph=True)(x), layer.gate(x))
print(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])
"""


def test_another_process_takes_compiled_code_from_the_cache(tmp_path: Path) -> None:
    """There, and after a second import, the operator is what the code calls."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    hits = [
        subprocess.run(
            [sys.executable, "-c", _CHILD], env=environment, check=True, capture_output=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert hits == [[b"0"], [b"1"]]
