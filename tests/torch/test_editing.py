"""Experts scaled, silenced, replaced and restored: only they change, and only as asked."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tensormoe import CP, BaseDelta, Gate, Hadamard, LayerSpec, TensorTrain
from tensormoe.errors import BackendError, ShapeError, SpecError
from tensormoe.testing import specs
from tensormoe_torch import (
    ConvMoE,
    MuMoE,
    MuMoEEmbedding,
    MuMoEMLP,
    merge_experts,
    permute_experts,
    replace_expert,
    restored,
    scale_experts,
    silence_experts,
    steered,
)
from tensormoe_torch.mxd import MixtureOfDecoders
from tensormoe_torch.official import PreNormed
from tests._kinds import KINDS
from tests.torch._helpers import assert_near, build, normal, pick, put, randomize, weights


@given(data=st.data())
def test_only_the_edited_experts_change(data: st.DataObject) -> None:
    """Every factorization, level, bias: weights built explicitly, before and after."""
    spec = data.draw(specs(), "spec")
    layer = build(spec, Gate(normalization=None), seed=data.draw(st.integers(0, 99), "seed"))
    level = data.draw(st.integers(0, spec.levels - 1), "level")
    place = data.draw(st.integers(0, spec.experts[level] - 1), "expert")
    x = normal(3, spec.in_features)
    before, coefficients = weights(layer), layer.coefficients(x)
    kept = {name: array.clone() for name, array in layer.state_dict().items()}
    parameters = [*layer.parameters()]

    if len(spec.network.terms) > 1:
        with pytest.raises(SpecError, match="part in common, so that none can be scaled or silen"):
            scale_experts(layer, {place: -2.5}, level)
        with pytest.raises(SpecError, match=r"part in common.*replace_expert"):
            silence_experts(layer, place, level)
    else:
        with restored(layer):
            scale_experts(layer, {place: -2.5}, level)
            scaled = -2.5 * pick(before, level, place)
            assert_near(weights(layer), put(before, level, place, scaled))
        with restored(layer):
            silence_experts(layer, place, level)
            assert_near(weights(layer), put(before, level, place, 0.0))
            assert not pick(weights(layer), level, place).any()
    source = data.draw(st.integers(0, spec.experts[level] - 1), "source")
    with restored(layer):
        assert replace_expert(layer, place, source=source, level=level) == 0.0
        assert_near(weights(layer), put(before, level, place, pick(before, level, source)))
        for name in {f"expert_{level}", "weight"} & set(layer.factors):
            axis = level if name == "weight" else 0
            rows = layer.factors[name].movedim(axis, 0)
            assert torch.equal(rows[place], rows[source])

    assert all(torch.equal(a, b) for a, b in zip(layer.coefficients(x), coefficients, strict=True))
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    assert all(torch.equal(array, kept[name]) for name, array in layer.state_dict().items())


def test_several_experts_at_once() -> None:
    layer = build(LayerSpec(4, 3, 5, CP(3)))
    before = weights(layer)
    scale_experts(layer, {0: 2.0, np.int64(3): 0, 4: 1})
    factors = np.array([2.0, 1.0, 1.0, 0.0, 1.0])[:, None, None]
    assert_near(weights(layer), before * factors)
    silence_experts(layer, (place for place in (1, 4, 1)))
    assert_near(weights(layer), before * factors * np.array([1, 0, 1, 1, 0])[:, None, None])
    scale_experts(layer, {})
    silence_experts(layer, [])


@pytest.mark.parametrize("level", [0, 1])
def test_blocks_are_edited_in_both_layers(level: int) -> None:
    block = randomize(MuMoEMLP(4, 5, 3, experts=(4, 3), rank=3, dtype=torch.float64))
    for layer in (block, PreNormed(block)):
        for edit in (
            lambda each: scale_experts(each, {1: 0.5, 2: 3.0}, level),
            lambda each: silence_experts(each, [1], level),
            lambda each: replace_expert(each, 1, source=2, level=level),
        ):
            before = [weights(each) for each in (block.first, block.second)]
            with restored(layer):
                edit(layer)
                both = [weights(each) for each in (block.first, block.second)]
            for place, single in enumerate((block.first, block.second)):
                assert_near(weights(single), before[place], 0.0)
                with restored(single):
                    edit(single)
                    assert_near(both[place], weights(single), 0.0)
                    assert np.abs(both[place] - before[place]).max() > 0.1


@pytest.mark.parametrize(
    "edit", [lambda block: silence_experts(block, 1), lambda block: scale_experts(block, {1: 2.0})]
)
def test_a_block_that_cannot_be_edited_stays_as_it_was(edit: Callable[[Any], None]) -> None:
    block = MuMoEMLP(4, 5, 3, experts=3, factorization=(CP(3), BaseDelta(2)), dtype=torch.float64)
    before = [weights(each) for each in (block.first, block.second)]
    with pytest.raises(SpecError, match="experts of base_delta have a part in common"):
        edit(block)
    for single, kept in zip((block.first, block.second), before, strict=True):
        assert_near(weights(single), kept, 0.0)


def test_embeddings_are_edited() -> None:
    table = randomize(MuMoEEmbedding(6, 3, 4, "dense", dtype=torch.float64))
    before = weights(table)
    given_ones = torch.eye(4, dtype=torch.float64)
    silence_experts(table, 2)
    found = table(torch.tensor([5, 5, 5, 5]), given_ones).detach().numpy()
    assert np.array_equal(found, put(before, 0, 2, 0.0)[:, 5])
    target = normal(6, 3)
    assert replace_expert(table, 1, target) == 0.0
    assert np.array_equal(weights(table)[1], target.numpy())


def test_everything_is_restored_after_an_exception() -> None:
    model = nn.Sequential(
        build(LayerSpec(4, 4, (3, 2), TensorTrain(2)), Gate()),
        randomize(MuMoEMLP(4, 5, 4, experts=3, rank=2, dtype=torch.float64)),
        nn.Linear(4, 4, dtype=torch.float64),
    )
    first: Any = model[0]
    kept = {name: array.clone() for name, array in model.state_dict().items()}

    def edit_and_fail() -> None:
        with restored(model):
            silence_experts(first, [0, 1, 2])
            with restored(model):
                scale_experts(first, {0: 3.0})
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1.0)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        edit_and_fail()
    for name, array in model.state_dict().items():
        changed = name.startswith("2.")
        assert torch.equal(array, kept[name] + 1.0 if changed else kept[name]), name


def test_optimizers_go_on_with_edited_layers() -> None:
    layer = build(LayerSpec(4, 3, 3, Hadamard()), Gate())
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.0)

    def step() -> None:
        optimizer.zero_grad()
        layer(normal(9, 4)).square().sum().backward()
        optimizer.step()

    step()
    silence_experts(layer, 1)
    with restored(layer):
        silence_experts(layer, [0, 2])
    before = weights(layer)
    assert np.array_equal(before[1], np.zeros((5, 3)))
    step()
    assert np.abs(weights(layer) - before).min(axis=(1, 2)).max() > 0.0
    assert len(optimizer.state) == len([*layer.parameters()])


@pytest.mark.parametrize(
    "edit",
    [
        lambda layer: scale_experts(layer, {1: 2.0}),
        lambda layer: silence_experts(layer, 1),
        lambda layer: replace_expert(layer, 1, source=0),
        lambda layer: replace_expert(layer, 1, torch.ones(4, 3)),
        lambda layer: merge_experts(layer, [0, 2]),
        lambda layer: permute_experts(layer, [1, 2, 0]),
        lambda layer: restored(layer)(lambda: None)(),
    ],
    ids=["scale", "silence", "copy", "replace", "merge", "permute", "restore"],
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_backward_pass_through_edited_experts_is_an_error(
    edit: Callable[[Any], Any], kind: Any, request: pytest.FixtureRequest
) -> None:
    if "delta" in kind.name and request.node.callspec.id.split("-")[-1] in ("scale", "silence"):
        pytest.skip("experts of a common base are not scaled")
    layer = build(LayerSpec(4, 3, 3, kind), Gate())
    output: Tensor = layer(normal(5, 4)).sum()
    edit(layer)
    assert all(each.requires_grad and each.is_leaf for each in layer.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


LAYER = build(LayerSpec(4, 3, (3, 2), CP(2), bias=False))
GATED = MuMoE(4, 3, experts=3, rank=2)
UNGATED = MuMoE(4, 3, experts=3, rank=2, gate=None)
BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: scale_experts(LAYER, {3: 2.0}), ShapeError, r"in \[0, 3\) at level 0; got 3"),
    (lambda: scale_experts(LAYER, {2: 2.0}, 1), ShapeError, r"in \[0, 2\) at level 1; got 2"),
    (lambda: silence_experts(LAYER, [0, -1]), ShapeError, r"in \[0, 3\) at level 0; got -1"),
    (lambda: silence_experts(LAYER, True), ShapeError, "got True"),
    (lambda: silence_experts(LAYER, 1.0), ShapeError, "got 1.0"),  # type: ignore[arg-type]
    (lambda: silence_experts(LAYER, 0, 2), ShapeError, r"level must lie in \[0, 2\).*got 2"),
    (lambda: silence_experts(LAYER, 0, -1), ShapeError, r"level must lie in \[0, 2\).*got -1"),
    (lambda: scale_experts(LAYER, {0: float("nan")}), SpecError, "finite number; got nan for"),
    (lambda: scale_experts(LAYER, {0: "2"}), SpecError, "finite number; got '2' for expert 0"),  # type: ignore[dict-item]
    (lambda: scale_experts(LAYER, [2.0]), TypeError, "must map experts' indices"),  # type: ignore[arg-type]
    (lambda: silence_experts(nn.Linear(2, 2), 0), TypeError, "got Linear"),  # type: ignore[arg-type]
    (lambda: restored(nn.Linear(2, 2)), TypeError, "hold a μMoE layer; got Linear"),
    (lambda: restored(3), TypeError, "must be a torch.nn.Module; got int"),  # type: ignore[arg-type]
    (lambda: replace_expert(LAYER, 3, source=0), ShapeError, "got 3"),
    (lambda: replace_expert(LAYER, 0, source=3), ShapeError, "got 3"),
    (lambda: replace_expert(LAYER, 0), SpecError, "weight absent, bias absent, source None"),
    (lambda: replace_expert(LAYER, 0, normal(2, 4, 3), source=1), SpecError, "either weight"),
    (lambda: replace_expert(LAYER, 0, bias=normal(2, 3), source=1), SpecError, "bias given"),
    (lambda: replace_expert(LAYER, 0, normal(4, 3)), ShapeError, r"\(2, 4, 3\); got \(4, 3\)"),
    (lambda: replace_expert(LAYER, 0, normal(2, 4, 3), level=1), ShapeError, r"\(3, 4, 3\)"),
    (lambda: replace_expert(LAYER, 0, normal(2, 4, 3), normal(2, 3)), SpecError, "no biases"),
    (lambda: replace_expert(LAYER, 0, torch.ones(2, 4, 3, dtype=int)), ShapeError, "int64. Cast"),  # type: ignore[call-overload]
    (lambda: replace_expert(LAYER, 0, np.ones((2, 4, 3))), BackendError, "array of torch"),  # type: ignore[arg-type]
    (lambda: replace_expert(LAYER, 0, normal(2, 4, 3).log()), ShapeError, r"finite; got nan at"),
    (lambda: merge_experts(LAYER, [0]), SpecError, "two experts at least, each once; got 1"),
    (lambda: merge_experts(LAYER, [0, 1], [1.0, -1.0]), SpecError, "not negative; got -1.0 for ex"),
    (lambda: permute_experts(LAYER, [0, 1]), SpecError, r"each of the 3 experts at level 0 once"),
    (lambda: permute_experts(LAYER, [0, 1, 1]), SpecError, r"once; got \[0, 1, 1\]"),
    (lambda: permute_experts(LAYER, [2, 1, 0]), SpecError, "has no gate that could be permuted"),
    (lambda: permute_experts(LAYER, [1, 0], 1, gate=None), SpecError, "gate must be True or Fal"),  # type: ignore[arg-type]
    (lambda: steered(nn.Linear(2, 2), {0: 1.0}), TypeError, "got Linear"),  # type: ignore[arg-type]
    (lambda: steered([], {0: 1.0}), SpecError, "at least one layer; got none"),
    (lambda: steered((each for each in [GATED]), {0: 1.0}), TypeError, "got generator"),  # type: ignore[arg-type]
    (lambda: steered(UNGATED, {0: 1.0}), SpecError, "must have a gate to be steered; got a MuMoE"),
    (lambda: steered(GATED, {3: 1.0}), ShapeError, r"in \[0, 3\); got 3"),
    (lambda: steered(GATED, {0: 1.0}, 1), ShapeError, r"level must lie in \[0, 1\)"),
    (lambda: steered(GATED, {0: float("inf")}), SpecError, "finite number; got inf for expert 0"),
    (lambda: steered(GATED, [1.0]), TypeError, "additions must map experts' indices"),  # type: ignore[arg-type]
    (
        lambda: replace_expert(MuMoEMLP(4, experts=2, rank=2), 0, normal(4, 4)),
        SpecError,
        "Edit block.first or",
    ),
]


@pytest.mark.parametrize(("edit", "error", "message"), BAD)
def test_what_cannot_be_is_refused_and_changes_nothing(
    edit: Callable[[], Any], error: type[Exception], message: str
) -> None:
    kept = {name: array.clone() for name, array in LAYER.state_dict().items()}
    with pytest.raises(error, match=message):
        edit()
    assert all(torch.equal(array, kept[name]) for name, array in LAYER.state_dict().items())


def test_values_that_do_not_fit_are_refused() -> None:
    layer = build(LayerSpec(4, 3, 3, CP(2)), dtype=torch.float16)
    kept = layer.factors["expert_0"].detach().clone()
    with pytest.raises(ShapeError, match="factors and the fitted ones must be finite"):
        replace_expert(layer, 0, 1e9 * normal(4, 3))
    biased = build(LayerSpec(4, 3, 3, CP(2)))
    with pytest.raises(ShapeError, match=r"bias must have shape \(3,\); got \(4,\)"):
        replace_expert(biased, 0, normal(4, 3), normal(4))
    with pytest.raises(ShapeError, match=r"bias must be finite; got inf at \(2,\)"):
        replace_expert(biased, 0, normal(4, 3), torch.tensor([0.0, 1.0, float("inf")]))
    assert torch.equal(layer.factors["expert_0"], kept)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("gate", [Gate(), Gate(normalization="batch", bias=True)], ids=str)
def test_permuted_layers_and_blocks_are_the_same_functions(gate: Gate, level: int) -> None:
    order = [[2, 0, 3, 1], [1, 2, 0]][level]
    block = randomize(MuMoEMLP(4, 5, 3, experts=(4, 3), rank=3, gate=gate, dtype=torch.float64))
    x = normal(9, 4)
    for layer in (block, PreNormed(block), build(LayerSpec(4, 3, (4, 3), TensorTrain(2)), gate)):
        layer(x)  # fills the buffers of batch norm
        layer.eval()
        kept = {name: array.clone() for name, array in layer.state_dict().items()}
        before = layer(x)
        with restored(layer):
            permute_experts(layer, order, level)
            assert_near(layer(x).detach().numpy(), before.detach().numpy())
            moved = {
                n for n, array in layer.state_dict().items() if not torch.equal(array, kept[n])
            }
            assert all(name.endswith(f"_{level}") for name in moved)
            assert any("factors.expert" in name for name in moved)
            assert any("gate.projection" in name for name in moved)
            assert any("gate.running" in name for name in moved) == bool(len([*layer.buffers()]))
            permute_experts(layer, np.argsort(order), level)
            for name, array in layer.state_dict().items():
                assert torch.equal(array, kept[name])
            permute_experts(layer, order, level, gate=False)
            assert (layer(x) - before).abs().max() > 1e-2
        assert torch.equal(layer(x), before)
        with restored(layer):
            permute_experts(layer, order, level)
        assert all(torch.equal(array, kept[name]) for name, array in layer.state_dict().items())


def test_gates_that_are_computed_are_not_permuted() -> None:
    layer = build(LayerSpec(4, 3, 3, CP(2)), Gate())
    assert layer.gate is not None
    nn.utils.parametrize.register_parametrization(layer.gate, "projection_0", nn.Softplus())
    before = weights(layer)
    with pytest.raises(SpecError, match="got a computed 'projection_0'"):
        permute_experts(layer, [1, 2, 0])
    assert_near(weights(layer), before, 0.0)
    with restored(layer):
        permute_experts(layer, [1, 2, 0], gate=False)
        assert_near(weights(layer), before[[1, 2, 0]], 0.0)
    assert_near(weights(layer), before, 0.0)


@pytest.mark.parametrize("compiled", [False, True])
def test_steered_coefficients_are_added_to(compiled: bool) -> None:
    block = randomize(MuMoEMLP(4, 5, 4, experts=(4, 3), rank=3, dtype=torch.float64))
    single = randomize(MuMoE(4, 3, experts=3, rank=2, dtype=torch.float64))
    model = nn.Sequential(block, PreNormed(single))
    run: Any = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    x, level = normal(7, 4), 1

    def by_hand(first: Tensor, second: Tensor) -> Tensor:
        coefficients = [*block.coefficients(x)]
        coefficients[level] = coefficients[level] + first
        hidden = block(x, coefficients)
        (mixed,) = single.coefficients(hidden)
        return single(nn.functional.layer_norm(hidden, (4,)), [mixed + second])

    none = torch.zeros(3, dtype=torch.float64)
    add = torch.tensor([0.0, 0.5, -0.25], dtype=torch.float64)
    kept = {name: array.clone() for name, array in model.state_dict().items()}
    with torch.no_grad():
        plain = run(x)
        assert_near(plain.numpy(), by_hand(none, none).numpy())
        with steered(block, {1: 0.5, 2: -0.25}, level):
            found = run(x)
            with steered(model[1], {1: 0.25}), steered(model[1], {1: 0.25, 2: -0.25}):
                both = run(x)
            assert torch.equal(run(x), found)
            coefficients, logits = block.route(x)
        assert torch.equal(logits[level], block.route(x)[1][level])
        assert torch.equal(coefficients[level], block.coefficients(x)[level] + add)
        assert torch.equal(coefficients[0], block.coefficients(x)[0])
        assert torch.equal(run(x), plain)
        assert_near(found.numpy(), by_hand(add, none).numpy())
        assert_near(both.numpy(), by_hand(add, add).numpy())
        assert float((both - found).abs().max()) > 1e-3 < float((plain - found).abs().max())
    assert all(torch.equal(array, kept[name]) for name, array in model.state_dict().items())


def test_steering_ends_in_any_order_and_after_exceptions() -> None:
    layer = randomize(MuMoE(4, 3, experts=3, rank=2))
    x = torch.ones(2, 4)
    (before,) = layer.coefficients(x)
    first, second = steered([layer], {0: 1.0}), steered([layer, layer], {0: 1.0})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(layer.coefficients(x)[0][:, 0], before[:, 0] + 1.0 + 1.0)
    second.__exit__(None, None, None)
    assert torch.equal(layer.coefficients(x)[0], before)

    def fail() -> None:
        with steered(layer, {0: 1.0}):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert torch.equal(layer.coefficients(x)[0], before)


def test_other_blocks_with_gates_are_steered() -> None:
    decoders = MixtureOfDecoders(6, experts=7, k=7)
    images = ConvMoE(2, 3, 3, experts=4, rank=2, padding=1)
    for block, x, gate_input in (
        (decoders, torch.ones(5, 6), torch.ones(5, 6)),
        (images, torch.ones(2, 2, 5, 5), None),
    ):
        for parameter in block.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        before = block(x)
        with steered(block, {1: 0.5}), steered(block.gate, {1: 0.5}):
            found = block(x)
        assert torch.equal(block(x), before)
        if gate_input is not None:
            (a,) = block.coefficients(gate_input)
            torch.testing.assert_close(found, block(x, coefficients=a + torch.eye(7)[1]))
        assert not torch.allclose(found, before)


def test_exported_layers_are_steered_and_steering_ends() -> None:
    layer = randomize(MuMoE(4, 3, experts=3, rank=2))
    x = torch.ones(2, 4)
    before = layer(x)
    with steered(layer, {0: 1.0}):
        found = layer(x)
        exported = torch.export.export(layer, (x,)).module()
    assert layer.gate is not None
    assert layer.gate.steering == ()
    assert torch.equal(layer(x), before)
    torch.testing.assert_close(exported(x), found)


def test_steering_trains_what_it_passes_through() -> None:
    layer = randomize(MuMoE(4, 3, experts=3, rank=2))
    with steered(layer, {0: 1.0}):
        layer(torch.ones(2, 4)).sum().backward()
    assert layer.gate is not None
    assert all(each.grad is not None for each in layer.parameters())


def test_computed_factors_are_refused() -> None:
    layer = build(LayerSpec(4, 3, 3, CP(2)))
    nn.utils.parametrize.register_parametrization(layer.factors, "expert_0", nn.Softplus())
    for edit in (
        lambda: scale_experts(layer, {0: 2.0}),
        lambda: replace_expert(layer, 0, source=1),
        lambda: restored(layer),
    ):
        with pytest.raises(SpecError, match="got a computed 'expert_0'"):
            edit()


def test_indices_without_end_are_refused() -> None:
    layer = MuMoE(6, 5, 4, CP(3))
    with pytest.raises(ShapeError, match=r"expert index must lie in \[0, 4\) at level 0; got 4"):
        silence_experts(layer, itertools.count())
