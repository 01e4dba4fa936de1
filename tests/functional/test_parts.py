"""Layers cut along one leg: the parts' results and gradients make those of the whole layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tensormoe import CP, Factorization, LayerSpec, TopK
from tensormoe.backend import get_backend
from tensormoe.errors import ShapeError, SpecError
from tensormoe.functional import (
    BlockConfig,
    LayerConfig,
    Options,
    apply_experts,
    cut_axes,
    experts_vjp,
    initialize,
    part_operands,
)
from tensormoe.gates import OneExpert
from tensormoe.routing import spread
from tests._kinds import UNEVEN

NUMPY = get_backend("numpy")
# sizes of legs that 2 or 3 or 4 devices cut, and bonds that do not all divide
SIZES = (12, 24, (6, 4))


def values(config: LayerConfig | BlockConfig, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in config.parameter_shapes().items()}


def slices(part: LayerConfig | BlockConfig, whole: dict[str, Any], place: int) -> dict[str, Any]:
    cut = (part.first if isinstance(part, BlockConfig) else part).spec.network.cut
    assert cut is not None
    return {
        name: whole[name] if axis is None else axis.cut(whole[name], cut.devices, place, NUMPY)
        for name, axis in cut_axes(part).items()
    }


def joined(parts: Sequence[Any], axis: int | None) -> Any:
    return np.sum(parts, axis=0) if axis is None else np.concatenate(parts, axis=axis)


@st.composite
def cuts(draw: st.DrawFn, **options: Any) -> tuple[LayerConfig, LayerConfig]:
    """A layer, and one device's part of it."""
    kind: Factorization = draw(st.sampled_from(UNEVEN))
    if draw(st.booleans()) and kind.bonds(2):
        kind = kind.with_rank(tuple(2 * size for size in kind.bonds(2)))
    config = LayerConfig(LayerSpec(*SIZES, kind, bias=draw(st.booleans())), None, **options)
    network = config.spec.network
    pairs = [
        (leg, count)
        for leg in network.shardable_legs
        for count in (1, 2, 3, 4)
        if network.sizes[leg] % count == 0
    ]
    return config, config.shard(*draw(st.sampled_from(pairs)))


def coefficients(rng: np.random.Generator, batch: int) -> list[Any]:
    # sparse, different for every input, and not adding up to one
    return [rng.standard_normal((batch, n)) * (rng.random((batch, n)) < 0.6) for n in SIZES[2]]


@given(cuts(), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_parts_make_the_whole_forward_and_backward(
    pair: tuple[LayerConfig, LayerConfig], batch: int, seed: int
) -> None:
    config, part = pair
    cut, names = part.spec.network.cut, part.spec.network.expert_legs
    assert cut is not None
    rng, arrays = np.random.default_rng(seed), values(config, seed)
    x, shares = rng.standard_normal((batch, 12)), coefficients(rng, batch)
    want, back = experts_vjp(config, arrays, x, shares, NUMPY)
    cotangent = rng.standard_normal(want.shape)
    wanted = back(cotangent)
    made, found = [], []
    for place in range(cut.devices):
        own, here, given_ = part_operands(
            part, slices(part, arrays, place), x, shares, place, NUMPY
        )
        result, back = experts_vjp(part, own, here, given_, NUMPY)
        made.append(result)
        piece = cotangent
        if cut.leg == "o":
            size = result.shape[-1]
            piece = cotangent[:, place * size : (place + 1) * size]
        found.append(back(piece))
    np.testing.assert_allclose(joined(made, -1 if cut.leg == "o" else None), want, atol=1e-8)
    legs = {f"factors.{each.name}": each.legs for each in config.spec.network.all_factors}
    legs |= {"x": ("b", "i")} | {f"coefficients_{n}": ("b", leg) for n, leg in enumerate(names)}
    for name, total in wanted.items():
        axis = legs[name].index(cut.leg) if cut.leg in legs[name] else None
        shares_of = [each[name] for each in found]
        if cut.leg == "i" and name.startswith("factors.bias"):
            # by what a device adds, of which the bias is P times the share
            shares_of = [each / cut.devices for each in shares_of]
        np.testing.assert_allclose(joined(shares_of, axis), total, atol=1e-7, err_msg=name)


@given(cuts(), st.integers(1, 3), st.integers(0, 99))
def test_few_experts_per_input(pair: tuple[LayerConfig, LayerConfig], k: int, seed: int) -> None:
    config, part = pair
    rng, arrays = np.random.default_rng(seed), values(config)
    x = rng.standard_normal((5, 12))
    chosen = [
        TopK(np.stack([rng.permutation(n)[:k] for _ in range(5)]), rng.standard_normal((5, k)))
        for n in SIZES[2]
    ]
    dense = [spread(each, n, NUMPY) for each, n in zip(chosen, SIZES[2], strict=True)]
    check(part, arrays, x, chosen, apply_experts(config, arrays, x, dense, NUMPY))


@given(cuts(indexed_input=True), st.integers(0, 99))
def test_embeddings_also_cut_by_their_rows(
    pair: tuple[LayerConfig, LayerConfig], seed: int
) -> None:
    config, part = pair
    assume(not config.spec.bias)
    rng, arrays = np.random.default_rng(seed), values(config)
    ids, shares = rng.integers(0, 12, 9), coefficients(rng, 9)
    check(part, arrays, ids, shares, apply_experts(config, arrays, ids, shares, NUMPY))


def check(part: LayerConfig, arrays: dict[str, Any], x: Any, shares: Any, want: Any) -> None:
    cut = part.spec.network.cut
    assert cut is not None
    made = [
        apply_experts(
            part,
            *part_operands(part, slices(part, arrays, place), x, shares, place, NUMPY),
            NUMPY,
        )
        for place in range(cut.devices)
    ]
    np.testing.assert_allclose(joined(made, -1 if cut.leg == "o" else None), want, atol=1e-8)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", UNEVEN, ids=repr)
def test_hidden_features_of_a_block_stay_on_their_device(kind: Factorization, gated: bool) -> None:
    config = Options((6, 4), kind, gate="softmax").block(12, 8, 10, "tanh", 0.0, gated=gated)
    part, arrays, rng = config.shard(2), values(config), np.random.default_rng(1)
    x, shares = rng.standard_normal((5, 12)), coefficients(rng, 5)

    def run(block: BlockConfig, own: dict[str, Any], place: int | None) -> Any:
        rows: Any = x
        for name in ("first", "second"):
            layer: LayerConfig = getattr(block, name)
            short = {
                each.removeprefix(f"{name}."): array
                for each, array in own.items()
                if each.startswith(name)
            }
            if place is None:
                rows = apply_experts(layer, short, rows, shares, NUMPY)
            else:
                operands = part_operands(layer, short, rows, shares, place, NUMPY)
                rows = apply_experts(layer, *operands, NUMPY)
            if name == "first":
                gate, *up = np.split(rows, 2, axis=-1) if gated else (rows,)
                rows = np.tanh(gate) * (up[0] if up else 1.0)
        return rows

    made = [run(part, slices(part, arrays, place), place) for place in range(2)]
    np.testing.assert_allclose(sum(made), run(config, arrays, None), rtol=1e-6, atol=1e-8)
    assert part.num_parameters < config.num_parameters
    assert {*part.parameter_shapes()} == {*config.parameter_shapes()}
    for name, array in slices(part, arrays, 1).items():
        assert array.shape == part.parameter_shapes()[name]


def test_the_gate_of_a_part_is_that_of_the_layer() -> None:
    config = Options(6, "cp", rank=4).layer(8, 4)
    for leg in ("n0", "i", "o", "r"):
        part = config.shard(leg, 2)
        assert part.gate_parameters == config.gate_parameters == 8 * 6
        assert part.parameter_shapes()["gate.projection_0"] == (8, 6)
        assert part.cost(3).parameters == part.num_parameters


CONFIG = LayerConfig(LayerSpec(8, 6, 4, CP(6)), None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CONFIG.shard("z", 2), "leg must be one of 'n0', 'i', 'o', 'r'; got 'z'"),
        (lambda: CONFIG.shard("r", 4), "multiple of the 4 devices; got 6 .* Legs that divide .*n0"),
        (lambda: CONFIG.shard("r", 11), "No leg of this layer divides"),
        (lambda: CONFIG.shard("r", 0), "devices must be a positive integer; got 0"),
        (lambda: CONFIG.shard("r", 2).shard("i", 2), "must be whole to be cut; got a slice"),
        (lambda: CONFIG.shard("r", 2).to_dict(), "must be whole to be saved"),
        (lambda: cut_axes(CONFIG), "one device's part of a layer; got a whole one"),
        (lambda: initialize_part(), "initial values must be those of a whole layer"),
        (
            lambda: Options(3, "cp", rank=2).block(4, 6, 4, "gelu", 0.0).shard(4),
            "multiple of the 4",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(call: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        call()


def initialize_part() -> None:
    part = CONFIG.shard("r", 2)
    draw = np.zeros
    initialize(part, NUMPY, normal=draw, uniform=draw, zeros=draw)


def test_rows_of_one_expert_need_all_experts() -> None:
    rows, one = np.ones((2, 8)), OneExpert(np.array([1, 3]))
    table = LayerConfig(LayerSpec(8, 6, 4, CP(6), bias=False), None, indexed_input=True)
    for config, leg in ((CONFIG, "n0"), (table, "i")):
        part = config.shard(leg, 2)
        with pytest.raises(ShapeError, match="one expert each need"):
            part_operands(part, {}, rows, [one], 0, NUMPY)


def test_sums_of_networks_are_cut_along_what_all_terms_have() -> None:
    found = {repr(kind): LayerSpec(*SIZES, kind).network.shardable_legs for kind in UNEVEN}
    assert found["BaseDelta(rank=2)"] == ("n0", "n1", "i", "o")
    assert found["CP(rank=3)"] == ("n0", "n1", "i", "o", "r")
    assert found["Hadamard()"] == ("n0", "n1", "i", "o")
