"""Blocks as values: what fits, what is stored, and what older files mean."""

from __future__ import annotations

from typing import Any

import pytest

from tensormoe import CP, Gate, LayerSpec
from tensormoe.errors import SpecError
from tensormoe.functional import BlockConfig, LayerConfig, Options

FIRST = LayerConfig(LayerSpec(4, 6, (3, 2), CP(2)), Gate())
SECOND = LayerConfig(LayerSpec(6, 5, (3, 2), CP(2)), None)
HALF = LayerConfig(LayerSpec(3, 5, (3, 2), CP(2)), None)


def test_sizes() -> None:
    plain, gated = BlockConfig(FIRST, SECOND, "gelu"), BlockConfig(FIRST, HALF, "silu", gated=True)
    assert (plain.hidden_features, gated.hidden_features) == (6, 3)
    assert gated.num_parameters == FIRST.num_parameters + HALF.num_parameters
    assert gated.parameter_shapes()["first.factors.output"] == (6, 2)


def test_plain_values_and_back() -> None:
    for config in (
        BlockConfig(FIRST, SECOND, "gelu", 0.25),
        BlockConfig(FIRST, HALF, "silu", gated=True),
    ):
        stored = config.to_dict()
        assert stored["gated"] is config.gated
        assert BlockConfig.from_dict(stored) == config


def test_values_without_the_field_are_not_gated() -> None:
    stored = BlockConfig(FIRST, SECOND, "gelu").to_dict()
    del stored["gated"]
    assert BlockConfig.from_dict(stored) == BlockConfig(FIRST, SECOND, "gelu")
    gated = BlockConfig(FIRST, HALF, "silu", gated=True).to_dict()
    del gated["gated"]
    with pytest.raises(SpecError, match="the layers of a block must fit"):
        BlockConfig.from_dict(gated)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gated": 1}, "gated must be True or False; got 1"),
        ({"gated": None}, "gated must be True or False; got None"),
        ({"gated": True}, "the layers of a gated block must fit: one hidden size, twice"),
        ({"glu": True}, "a block's config must have exactly"),
        ({"act_layer": "mish"}, "act_layer must be one of 'gelu'.*; got 'mish'"),
        ({"act_layer": None}, "act_layer must be a name"),
        ({"drop": 1.0}, "act_layer must be a name and drop in"),
    ],
    ids=str,
)
def test_values_that_cannot_be(change: dict[str, Any], message: str) -> None:
    stored = BlockConfig(FIRST, SECOND, "gelu").to_dict()
    with pytest.raises(SpecError, match=message):
        BlockConfig.from_dict({**stored, **change})


@pytest.mark.parametrize(
    "pair",
    [
        (FIRST, HALF),
        (FIRST, LayerConfig(LayerSpec(6, 5, (3, 3), CP(2)), None)),
        (FIRST, LayerConfig(SECOND.spec, Gate())),
    ],
    ids=["hidden size", "experts", "two gates"],
)
def test_layers_that_do_not_fit(pair: tuple[LayerConfig, LayerConfig]) -> None:
    with pytest.raises(SpecError, match="the layers of a block must fit: one hidden size"):
        BlockConfig(*pair, "gelu")


def test_activations_without_a_name_are_not_stored() -> None:
    config = BlockConfig(FIRST, SECOND, None)
    with pytest.raises(SpecError, match=r"act_layer must be one of .* to be saved; this block"):
        config.to_dict()


def test_resolved_from_arguments() -> None:
    options = Options(3, rank=2, bias=False)
    config = options.block(4, 6, act_layer="silu", gated=True)
    assert (config.first.spec.out_features, config.second.spec.in_features) == (12, 6)
    assert config.gated
    for hidden in (0, 2.5, "6"):
        with pytest.raises(SpecError, match="hidden_features must be a positive integer"):
            options.block(4, hidden, gated=True)  # type: ignore[arg-type]


def test_a_single_layer_has_one_factorization() -> None:
    options = Options(3, ("cp", "tucker"), rank=2)
    with pytest.raises(SpecError, match="factorization must be one for a single layer; got"):
        options.layer(4, 6)
