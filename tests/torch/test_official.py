"""State dicts of the paper's released code: the same outputs, back again, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from entmax import entmax15, sparsemax
from torch import Tensor, nn

from tensormoe import CP, Gate, TensorRing, TensorTrain
from tensormoe.errors import CheckpointError, ShapeError, SpecError
from tensormoe_torch import MuMoE, MuMoEEmbedding, MuMoEMLP, from_official, to_official
from tensormoe_torch.official import PreNormed
from tests.torch._helpers import normal, randomize

IN, HIDDEN, OUT = 6, 7, 5
EXPERTS = [(4,), (4, 3)]
KINDS = ["cp", "ring"]
NORMS = ["bn", "ln"]
CASES = [
    pytest.param(*case, id=f"{case[0]}-{len(case[1])}lv-{case[2]}-{case[3]}ly-ln{case[4]:d}")
    for case in product(KINDS, EXPERTS, NORMS, [1, 2], [False, True])
]


def official(
    kind: str = "cp",
    experts: Sequence[int] = (4,),
    norm: str = "bn",
    layers: int = 1,
    input_ln: bool = False,
    bias: bool = True,
    ring: Sequence[int] = (3, 2, 4, 5),
) -> dict[str, Tensor]:
    """A state dict as the released code's modules would save it, of random values."""
    shapes: dict[str, tuple[int, ...]] = {}
    widths = [IN, HIDDEN, OUT] if layers == 2 else [IN, OUT]
    for layer, name in enumerate(("MuMoE", "MuMoE2")[:layers]):
        modes = [*experts, widths[layer] + bias, widths[layer + 1]]
        for k, size in enumerate(modes):
            ends = (ring[k], size, ring[(k + 1) % len(modes)])
            shapes[f"{name}.factors.{k}"] = (size, 8) if kind == "cp" else ends
    if input_ln:
        shapes |= {"input_ln.weight": (IN,), "input_ln.bias": (IN,)}
    shapes |= {f"projs.{k}": (IN, count) for k, count in enumerate(experts)}
    state = {name: normal(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    for k, count in enumerate(experts if norm == "bn" else ()):
        state[f"bn.{k}.running_mean"] = normal(count, seed=50 + k)
        state[f"bn.{k}.running_var"] = normal(count, seed=60 + k).abs() + 0.5
        state[f"bn.{k}.num_batches_tracked"] = torch.tensor(17)
    return state


def forward(
    state: Mapping[str, Tensor], x: Tensor, training: bool = False, activation: Any = entmax15
) -> tuple[Tensor, dict[str, Tensor]]:
    """The released layer from its formulas; with batch norm's statistics behind a training step."""
    x = x[:, None, :] if x.ndim == 2 else x
    levels = sum(name.startswith("projs.") for name in state)
    coefficients, statistics = [], {}
    for k in range(levels):
        logits = torch.einsum("bti,in->btn", x, state[f"projs.{k}"])
        if "bn.0.running_mean" not in state:
            normed = F.layer_norm(logits, logits.shape[-1:])
        else:
            mean = state[f"bn.{k}.running_mean"].clone()
            variance = state[f"bn.{k}.running_var"].clone()
            moved = logits.permute(0, 2, 1)
            normed = F.batch_norm(moved, mean, variance, training=training).permute(0, 2, 1)
            statistics |= {f"bn.{k}.running_mean": mean, f"bn.{k}.running_var": variance}
        coefficients.append(activation(normed, dim=-1))
    if "input_ln.weight" in state:
        x = F.layer_norm(x, x.shape[-1:], state["input_ln.weight"], state["input_ln.bias"])
    for layer in ("MuMoE", "MuMoE2"):
        if f"{layer}.factors.0" not in state:
            continue
        x = F.gelu(x) if layer == "MuMoE2" else x
        x = mixture([state[f"{layer}.factors.{k}"] for k in range(levels + 2)], x, coefficients)
    return x, statistics


def mixture(factors: list[Tensor], x: Tensor, coefficients: list[Tensor]) -> Tensor:
    """𝒲 built in full, then contracted with everything."""
    if factors[0].ndim == 2:
        equation = ",".join(f"{mode}r" for mode in "nmio"[4 - len(factors) :])
        if len(factors) == 3:
            equation = "nr,ir,or"
        full = torch.einsum(f"{equation}->{equation[::3]}", *factors)
    else:
        chain = factors[0]
        for core in factors[1:]:
            chain = torch.tensordot(chain, core, dims=1)
        full = chain.diagonal(dim1=0, dim2=-1).sum(-1)
    if full.shape[-2] == x.shape[-1] + 1:
        x = torch.cat([x, torch.ones(*x.shape[:-1], 1, dtype=x.dtype)], dim=-1)
    if len(coefficients) == 1:
        return torch.einsum("nio,btn,bti->bto", full, coefficients[0], x)
    return torch.einsum("nmio,btn,btm,bti->bto", full, *coefficients, x)


def statistics_of(layer: Any) -> dict[str, Tensor]:
    gate = (layer.block if isinstance(layer, PreNormed) else layer).gate
    names = {"running_mean": "running_mean", "running_variance": "running_var"}
    return {
        f"bn.{name.rpartition('_')[2]}.{names[name.rpartition('_')[0]]}": array
        for name, array in gate.named_buffers()
    }


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same names, values, dtypes and devices."""
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].device == array.device, name
        assert torch.equal(found[name], array), name


@pytest.mark.parametrize(("kind", "experts", "norm", "layers", "input_ln"), CASES)
def test_outputs_are_those_of_the_released_code(
    kind: str, experts: tuple[int, ...], norm: str, layers: int, input_ln: bool
) -> None:
    state = official(kind, experts, norm, layers, input_ln)
    layer = from_official(state)
    assert isinstance(layer, PreNormed) == input_ln
    assert isinstance(layer.block if input_ln else layer, MuMoEMLP if layers == 2 else MuMoE)
    assert layer.training
    x = normal(9, 3, IN, seed=99)
    for training in (True, False):
        want, statistics = forward(state, x, training)
        scale = float(want.abs().max())
        found = from_official(state).train(training)
        assert float((found(x).detach() - want).abs().max()) < 1e-10 * scale
        for name, array in statistics_of(found).items():
            torch.testing.assert_close(array, statistics[name], rtol=1e-12, atol=1e-12)
    flat = x[:, 0]
    want = forward(state, flat)[0][:, 0]
    assert float((layer.eval()(flat).detach() - want).abs().max()) < 1e-10 * scale


@pytest.mark.parametrize(("kind", "experts", "norm", "layers", "input_ln"), CASES)
def test_state_dicts_come_back_key_for_key(
    kind: str, experts: tuple[int, ...], norm: str, layers: int, input_ln: bool
) -> None:
    for dtype in (torch.float32, torch.float64):
        state = official(kind, experts, norm, layers, input_ln)
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        written = to_official(from_official(state), batches=17)
        assert_same(written, state)
        assert list(written) == list(state)
        assert all(array.is_contiguous() for array in written.values())
        assert not any(array.requires_grad for array in written.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2])
def test_layers_without_biases(kind: str, layers: int) -> None:
    state = official(kind, layers=layers, bias=False)
    layer = from_official(state)
    first = layer.first if isinstance(layer, MuMoEMLP) else layer
    assert isinstance(first, MuMoE)
    assert not first.spec.bias
    x = normal(9, 2, IN, seed=99)
    torch.testing.assert_close(layer.eval()(x), forward(state, x)[0])
    assert_same(to_official(layer, batches=17), state)


def test_sizes_ranks_and_levels_come_from_shapes() -> None:
    ring = from_official(official("ring", (4, 3), "ln"))
    assert isinstance(ring, MuMoE)
    assert ring.spec.factorization == TensorRing((3, 2, 4, 5))
    assert ring.config.gate == Gate.paper()
    block = from_official(official("cp", (4, 3), "bn", 2))
    assert isinstance(block, MuMoEMLP)
    assert block.first.spec.factorization == CP(8)
    assert block.config.first.gate == Gate.paper("batch")
    sizes = [
        (each.in_features, each.out_features) for each in (block.first.spec, block.second.spec)
    ]
    assert sizes == [(IN, HIDDEN), (HIDDEN, OUT)]
    assert block.first.spec.experts == block.second.spec.experts == (4, 3)


def test_a_ring_with_an_outer_bond_of_one_may_be_a_train() -> None:
    state = official("ring", (4, 3), layers=2, ring=(1, 2, 4, 5))
    layer = from_official(state, factorization="tensor_train")
    assert isinstance(layer, MuMoEMLP)
    assert layer.second.spec.factorization == TensorTrain((2, 4, 5))
    x = normal(9, 2, IN, seed=99)
    torch.testing.assert_close(layer.eval()(x), forward(state, x)[0])
    assert_same(to_official(layer, batches=17), state)
    with pytest.raises(CheckpointError, match=r"shape \(1, 4, 2\); got \(3, 4, 2\)"):
        from_official(official("ring"), factorization="tensor_train")


@pytest.mark.parametrize("activation", ["sparsemax", "softmax"])
def test_another_activation(activation: str) -> None:
    state = official("cp", (4, 3))
    layer = from_official(state, activation=activation).eval()
    x = normal(9, 2, IN, seed=99)
    known = {"sparsemax": sparsemax, "softmax": torch.softmax}
    torch.testing.assert_close(layer(x), forward(state, x, activation=known[activation])[0])
    assert_same(to_official(layer, batches=17), state)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("input_ln", [False, True])
@pytest.mark.parametrize("kind", [CP(8), TensorRing((3, 2, 4, 5)), TensorTrain((2, 4, 5))])
def test_own_layers_are_written_and_read(block: bool, input_ln: bool, kind: Any) -> None:
    options: dict[str, Any] = {
        "experts": (4, 3),
        "factorization": kind,
        "gate": Gate.paper("batch"),
        "dtype": torch.float64,
    }
    layer: Any
    layer = MuMoEMLP(IN, HIDDEN, OUT, **options) if block else MuMoE(IN, OUT, **options)
    layer = randomize(PreNormed(layer) if input_ln else layer)
    name = kind.name if kind.name == "tensor_train" else None
    again = from_official(to_official(layer), factorization=name)
    assert type(again) is type(layer)
    assert_same(again.state_dict(), layer.state_dict())
    assert repr(again) == repr(layer)


def test_dtypes_and_devices_are_kept() -> None:
    narrow = {k: v.to(torch.bfloat16) for k, v in official("ring", norm="ln").items()}
    layer = from_official(narrow)
    assert {each.dtype for each in layer.parameters()} == {torch.bfloat16}
    assert_same(to_official(layer), narrow)
    # statistics are float32 at least: they lose nothing on the way in, or out
    state = official("ring")
    mixed = {k: v.to(torch.float32 if "bn" in k else torch.bfloat16) for k, v in state.items()}
    mixed["bn.0.num_batches_tracked"] = state["bn.0.num_batches_tracked"]
    assert_same(to_official(from_official(mixed), batches=17), mixed)
    on_meta = {name: array.to("meta") for name, array in official(layers=2, input_ln=True).items()}
    assert {each.device.type for each in from_official(on_meta).parameters()} == {"meta"}


def test_arrays_are_copied_both_ways() -> None:
    state = official("cp", layers=2, input_ln=True)
    kept = {name: array.clone() for name, array in state.items()}
    layer = from_official(state)
    randomize(layer)
    assert_same(state, kept)
    before = {name: array.clone() for name, array in layer.state_dict().items()}
    for array in to_official(layer).values():
        array.zero_()
    assert_same(layer.state_dict(), before)


def test_a_layer_inside_a_model() -> None:
    model = {"wte.weight": normal(3, 2)}
    for k in range(2):
        made = official("cp", norm="ln", layers=2, input_ln=True, experts=EXPERTS[k])
        model |= {f"h.{k}.mlp.MuMoE_layer.{name}": array for name, array in made.items()}
    layer = from_official(model, prefix="h.1.mlp.MuMoE_layer")
    prefix = "h.1.mlp.MuMoE_layer."
    inside = {name: array for name, array in model.items() if name.startswith(prefix)}
    assert_same(to_official(layer, prefix=prefix), inside)
    with pytest.raises(CheckpointError, match=r"one: 'h\.0\.mlp\.MuMoE_layer\.', 'h\.1\.m"):
        from_official(model)
    with pytest.raises(CheckpointError, match=r"none under prefix 'wte'.* 'h\.0\.mlp\.Mu"):
        from_official(model, prefix="wte")
    with pytest.raises(CheckpointError, match="Prefixes with one: none"):
        from_official({})


def changed(state: dict[str, Tensor], **changes: Any) -> dict[str, Any]:
    """A state dict with arrays changed, or removed by None; ``_`` in names is a dot."""
    made: dict[str, Any] = {**state, **{k.replace("__", "."): v for k, v in changes.items()}}
    return {name: array for name, array in made.items() if array is not None}


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"MuMoE__factors__1": None, "surprise": normal(2), "MuMoE__factors__2": normal(OUT, 3)},
            [
                r"'MuMoE.factors.1' \(7, 8\) is missing",
                r"'surprise' \(2,\) is unexpected",
                r"'MuMoE.factors.2' must have the shape \(5, 8\); got \(5, 3\)",
            ],
        ),
        ({"MuMoE__factors__2": None}, [r"'MuMoE.factors.2' \(-1, 8\) is missing"]),
        ({"MuMoE__factors__1": normal(9, 8)}, [r"\(7, 8\); got \(9, 8\)"]),
        ({"MuMoE__factors__0": normal(3, 8)}, [r"\(4, 8\); got \(3, 8\)"]),
        ({"MuMoE__factors__3": normal(3, 8)}, [r"'MuMoE.factors.3' \(3, 8\) is unexpected"]),
        ({"MuMoE__factors__1": normal(7, 8, 1)}, [r"must be those of a tensor ring"]),
        ({"projs__2": normal(IN, 2)}, [r"'projs.1' .* missing", r"'projs.2' .* unexpected"]),
        ({"bn__0__running_var": None}, [r"'bn.0.running_var' \(4,\) is missing"]),
        ({"bn__0__running_mean": normal(3)}, [r"\(4,\); got \(3,\)"]),
        ({"input_ln__weight": normal(IN)}, [r"'input_ln.bias' \(6,\) is missing"]),
        ({"MuMoE2__factors__0": normal(4, 8)}, [r"'MuMoE2.factors.1' \(6, 8\) is missing"]),
        ({"projs__0": normal(IN, 4).float()}, [r"torch.float32, as 'projs.0'; got torch.float64"]),
        ({"projs__0": torch.ones(IN, 4, dtype=torch.int64)}, [r"int64, as 'projs.0'"]),
        ({"bn__0__running_mean": torch.zeros(4, dtype=torch.int64)}, ["must be floating point"]),
        ({"bn__0__num_batches_tracked": torch.tensor(1.5)}, ["must be integers"]),
        ({"MuMoE__factors__1": normal(7, 8).to("meta")}, ["must be on cpu; got meta"]),
        ({"MuMoE__factors__1": [1.0]}, ["'MuMoE.factors.1': list"]),
    ],
)
def test_every_difference_is_listed(changes: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_official(changed(official(), **changes))
    for line in lines:
        assert caught.match(line)


def test_differences_of_blocks_and_rings() -> None:
    block = official("ring", (4, 3), layers=2)
    with pytest.raises(CheckpointError, match=r"MuMoE2.factors.2' .* \(4, 8, 5\); got \(4, 7, 5\)"):
        from_official(changed(block, MuMoE2__factors__2=normal(4, HIDDEN, 5)))
    with pytest.raises(CheckpointError, match=r"MuMoE.factors.3' .* \(5, 7, 3\); got \(5, 7, 4\)"):
        from_official(changed(block, MuMoE__factors__3=normal(5, HIDDEN, 4)))
    with pytest.raises(CheckpointError, match=r"must be those of a CP layer"):
        from_official(block, factorization="cp")
    empty = {name: array[..., :0] for name, array in official(norm="ln").items() if "." in name}
    with pytest.raises(CheckpointError, match="positive integer"):
        from_official(empty | {"projs.0": normal(IN, 4)})
    integers = {name: array.to(torch.int32) for name, array in official(norm="ln").items()}
    with pytest.raises(CheckpointError, match=r"one real floating-point dtype; got torch\.int32"):
        from_official(integers)


def test_arguments_of_reading() -> None:
    with pytest.raises(SpecError, match="factorization must be one of 'cp'"):
        from_official(official(), factorization="tucker")
    with pytest.raises(SpecError, match="activation must be one of 'entmax'"):
        from_official(official(), activation="top_k")
    with pytest.raises(TypeError, match="state must be a mapping"):
        from_official([("projs.0", normal(2, 2))])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="prefix must be a string"):
        from_official(official(), prefix=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        (MuMoE(4, 3, 2, "dense"), r"tensor train; got Dense\(\)"),
        (MuMoE(4, 3, (2, 2, 2), CP(2)), r"one or two levels; got \(2, 2, 2\)"),
        (MuMoE(4, 3, 2, CP(2), gate=None), "must have a gate"),
        (MuMoE(4, 3, 2, CP(2), gate=Gate(bias=True)), "bias of the gate must be False; got True"),
        (MuMoE(4, 3, 2, CP(2), gate=Gate(normalization=None)), "normalization of the gate"),
        (MuMoE(4, 3, 2, CP(2), gate=Gate(eps=1e-3)), "eps of the gate must be 1e-05; got 0.001"),
        (MuMoE(4, 3, 2, CP(2), gate=Gate(momentum=0.2)), "momentum of the gate"),
        (MuMoE(4, 3, 2, CP(2), gate=Gate(alpha=2.0)), "must be entmax-1.5"),
        (MuMoE(4, 3, 2, CP(2), gate=Gate("top_k", k=1)), "must be entmax-1.5"),
        (MuMoEMLP(4, 3, act_layer="relu", experts=2, rank=2), "act_layer must be 'gelu'"),
        (
            MuMoEMLP(4, 3, act_layer=torch.sin, experts=2, rank=2),
            "act_layer must be 'gelu'; got None",
        ),
        (MuMoEMLP(4, 3, gated=True, experts=2, rank=2), "gated must be False; got True"),
        (MuMoEMLP(4, experts=2, factorization=(CP(2), CP(3))), "stored alike"),
        (MuMoEMLP(4, experts=2, factorization=(CP(2), TensorRing(2))), "stored alike"),
        (PreNormed(MuMoE(4, 3, 2, CP(2)), nn.LayerNorm(4, eps=1e-3)), "norm must be LayerNorm"),
        (PreNormed(MuMoE(4, 3, 2, CP(2)), nn.LayerNorm(4, bias=False)), "with a bias"),
        (PreNormed(MuMoE(4, 3, 2, CP(2)), nn.RMSNorm(4)), "got RMSNorm"),
    ],
)
def test_layers_that_the_released_code_cannot_hold(layer: Any, line: str) -> None:
    with pytest.raises(SpecError, match=line):
        to_official(layer)


def test_arguments_of_writing() -> None:
    with pytest.raises(TypeError, match="MuMoE, a MuMoEMLP or a PreNormed; got MuMoEEmbedding"):
        to_official(MuMoEEmbedding(4, 3, 2, rank=2))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="batches must be an integer of at least 0; got -1"):
        to_official(MuMoE(4, 3, 2, rank=2), batches=-1)


def test_a_norm_that_the_gate_does_not_see() -> None:
    layer = randomize(PreNormed(MuMoEMLP(IN, HIDDEN, OUT, experts=4, rank=3, dtype=torch.float64)))
    x = 5.0 * normal(9, IN)
    given = layer.coefficients(x)
    assert torch.equal(given[0], layer.block.gate(x)[0])
    assert torch.equal(layer(x), layer.block(layer.norm(x), given))
    assert torch.equal(layer(x, given), layer(x))
    assert float((layer.block.gate(layer.norm(x))[0] - given[0]).detach().abs().max()) > 0.01
    with pytest.raises(ShapeError, match="must end in an axis of 6 features"):
        layer(x[:, :-1], given)
    with pytest.raises(ShapeError, match="dtype"):
        layer(x.float(), given)
    with pytest.raises(TypeError, match="An embedding has no input to norm"):
        PreNormed(MuMoEEmbedding(4, 3, 2, rank=2))  # type: ignore[arg-type]
