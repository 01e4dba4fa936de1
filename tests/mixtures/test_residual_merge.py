"""Residual mixtures: merging, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import tensormoe_numpy
import tensormoe_torch
from tensormoe import (
    CP,
    Gate,
    LayerSpec,
)
from tensormoe import TensorRing as Ring
from tensormoe.checkpoint import save_checkpoint
from tensormoe.errors import (
    BackendError,
    BudgetError,
    CheckpointError,
    RankError,
    ShapeError,
    SpecError,
)
from tensormoe.functional import LayerConfig, Options
from tensormoe.mixtures import ResidualConfig, residual_config
from tensormoe_torch import MuMoE, ResidualExperts, SparseMoE
from tests.mixtures._residual import (
    EQUINOX,
    NNX,
    base_of,
    double,
    each_factorization,
    inputs,
    layer_of,
    moved,
)

# Merging


@each_factorization
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_merged_layer_is_linear(factorization: Any, bias: bool, dtype: torch.dtype) -> None:
    options = {"factorization": factorization, "rank": None, "experts": (2, 3), "scale": 0.25}
    base = base_of(dtype=dtype, bias=not bias)
    layer = moved(layer_of(base, bias=bias, **options))
    before = base.weight.clone()
    given = torch.rand(2), torch.rand(3)
    merged = layer.merge(given)
    assert type(merged) is nn.Linear
    assert torch.equal(base.weight, before)
    assert not any(each.requires_grad for each in merged.parameters())
    x = inputs(7, dtype=dtype)
    wanted = layer(x, [each.expand(7, -1) for each in given])
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    assert (merged(x) - wanted).abs().max() < tolerance * wanted.abs().max()


def test_one_expert_is_merged_without_coefficients() -> None:
    layer = moved(layer_of(experts=1))
    torch.testing.assert_close(layer.merge()(inputs(3)), layer(inputs(3)))
    positive = layer_of(experts=1, gate=Gate("relu_top_k", k=1))
    with pytest.raises(SpecError, match=r"must have fixed coefficients .* got 1 expert\(s\)"):
        positive.merge()


def test_merged_in_jax() -> None:
    given, x = jnp.array([0.1, 0.2, 0.3, 0.9]), jnp.asarray(inputs(7).numpy())
    rows = jnp.broadcast_to(given, (7, 4))
    options: Any = {"experts": 4, "rank": 2, "scale": 2.0, "bias": True}
    for held in (True, False):
        flax = NNX.ResidualExperts(
            nnx.Linear(6, 5, rngs=nnx.Rngs(0), use_bias=held), rngs=1, **options
        )
        flax.adapter.factors["output"][...] += 1.0
        merged = flax.merge(given)
        assert type(merged) is nnx.Linear
        np.testing.assert_allclose(merged(x), flax(x, rows), rtol=1e-4, atol=1e-5)
        keys = jax.random.split(jax.random.key(0))
        linear = eqx.nn.Linear(6, 5, use_bias=held, key=keys[0])
        layer = EQUINOX.ResidualExperts(linear, key=keys[1], **options)
        layer = eqx.tree_at(lambda each: each.adapter.factors["output"], layer, jnp.ones((5, 2)))
        whole = layer.merge(given)
        assert type(whole) is eqx.nn.Linear
        np.testing.assert_allclose(jax.vmap(whole)(x), layer(x, rows), rtol=1e-4, atol=1e-5)
        with pytest.raises(SpecError, match=r"fixed coefficients"):
            layer.merge()
    weight, bias = tensormoe_numpy.ResidualExperts(double, 6, 6, seed=0, **options).delta(
        np.ones(4, "float32")
    )
    assert (weight.shape, bias.shape, weight.any()) == ((6, 6), (6,), False)


def _experts(package: Any, **options: Any) -> Any:
    return package.MuMoE(6, 5, 4, "dense", gate=None, **options)


def test_experts_of_a_router_are_merged_one_by_one() -> None:
    base = _experts(tensormoe_torch)
    layer = moved(layer_of(base, gate=None, bias=True, scale=0.5))
    given = torch.rand(3, 4)
    wanted = base(inputs(3), given) + 0.5 * layer.adapter(inputs(3), given)
    torch.testing.assert_close(layer(inputs(3), given), wanted)
    merged = layer.merge()
    assert type(merged) is MuMoE
    torch.testing.assert_close(merged(inputs(3), given), wanted)
    x, rows = jnp.asarray(inputs(3).numpy()), jnp.asarray(given.numpy())
    options: Any = {"experts": 4, "rank": 2, "gate": None}
    flax = NNX.ResidualExperts(_experts(NNX, rngs=0), rngs=1, **options)
    flax.adapter.factors["output"][...] += 1.0
    np.testing.assert_allclose(flax.merge()(x, rows), flax(x, rows), rtol=1e-4, atol=1e-5)
    key = jax.random.key(0)
    layer = EQUINOX.ResidualExperts(_experts(EQUINOX, key=key), key=key, **options)
    layer = eqx.tree_at(lambda each: each.adapter.factors["output"], layer, jnp.ones((5, 2)))
    np.testing.assert_allclose(layer.merge()(x, rows), layer(x, rows), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_merged() -> None:
    cases: list[tuple[Any, Any, str]] = [
        (layer_of(), None, r"fixed coefficients .* got 4 expert\(s\) with Gate"),
        (layer_of(gate=None), None, r"got 4 expert\(s\) with no gate"),
        (
            layer_of(nn.Sequential(base_of()), in_features=6, out_features=5),
            None,
            r"got a Sequential",
        ),
        (layer_of(), torch.ones(3), r"shape \(4,\) at level 0; got torch.float32 \(3,\)"),
        (layer_of(), torch.ones(4, dtype=torch.int64), r"must be floats"),
        (layer_of(), [torch.ones(4)] * 2, r"one array per level, 1; got 2"),
        (layer_of(), np.ones(4), r"coefficients of level 0"),
        (layer_of(_experts(tensormoe_torch), gate=None), torch.ones(4), r"one by one; got coeff"),
        (
            layer_of(MuMoE(6, 5, 4, CP(2), gate=None), gate=None),
            None,
            r"must be dense to be merged .* got CP\(rank=2\)",
        ),
        (
            layer_of(_experts(tensormoe_torch, bias=False), gate=None, bias=True),
            None,
            r"must have biases to be merged",
        ),
    ]
    for layer, given, message in cases:
        with pytest.raises((SpecError, ShapeError, BackendError), match=message):
            layer.merge(given)


class _Own(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def test_a_base_that_runs_in_another_way_is_not_merged() -> None:
    with pytest.raises(SpecError, match=r"has a forward of its own"):
        layer_of(_Own(6, 5), experts=1).merge()


# Bad input


def test_bad_arguments() -> None:
    bad: list[tuple[Any, type[Exception], str]] = [
        (lambda: layer_of(3), SpecError, r"base must be an nn.Module; got int"),
        (lambda: layer_of(nn.ReLU()), SpecError, r"in_features must be given .* for a ReLU"),
        (
            lambda: layer_of(in_features=7),
            SpecError,
            r"in_features must be the base's own, 6; got 7",
        ),
        (lambda: layer_of(out_features=0), SpecError, r"out_features must be a positive integer"),
        (lambda: layer_of(rank=0), RankError, r"rank"),
        (
            lambda: layer_of(factorization=Ring((1, 2, 3, 4)), rank=None),
            RankError,
            r"rank must have",
        ),
        (lambda: layer_of(budget=3), RankError, r"exclude one another"),
        (lambda: layer_of(rank=None, budget=3), BudgetError, r"3"),
        (lambda: layer_of(scale=float("nan")), SpecError, r"scale must be a finite number"),
        (
            lambda: layer_of(scale=0),
            SpecError,
            r"must be a finite number other than 0; got 0",
        ),
        (lambda: layer_of(scale="2"), SpecError, r"scale must be"),
        (lambda: layer_of(gate="nothing"), Exception, r"nothing"),
        (
            lambda: layer_of(_experts(tensormoe_torch)),
            SpecError,
            r"must share coefficients: experts=\(4,\) and gate=None; got experts=\(4,\) and gate=G",
        ),
        (
            lambda: tensormoe_numpy.ResidualExperts(3, 6, 6, experts=2),  # type: ignore[arg-type]
            SpecError,
            r"base must be a layer, called with arrays",
        ),
        (
            lambda: NNX.ResidualExperts(None, 6, 6, experts=2, rngs=0),  # type: ignore[arg-type]
            SpecError,
            r"base must be a layer",
        ),
        (
            lambda: EQUINOX.ResidualExperts(
                eqx.nn.Linear("scalar", 5, key=jax.random.key(0)), experts=2, key=jax.random.key(0)
            ),
            SpecError,
            r"in_features must be given",
        ),
        (
            lambda: ResidualConfig(LayerConfig(LayerSpec(4, 4, 2, CP(2)), None, True)),
            SpecError,
            r"got one for ids",
        ),
        (lambda: ResidualConfig(3), SpecError, r"layer must be a LayerConfig"),  # type: ignore[arg-type]
        (
            lambda: ResidualExperts.of(layer_of().config, base_of(7, 5)),
            SpecError,
            r"in_features must be the base's own, 7; got 6",
        ),
    ]
    for call, error, message in bad:
        with pytest.raises(error, match=message):
            call()


def test_bad_calls() -> None:
    wide = layer_of(nn.Sequential(base_of()), in_features=6, out_features=4)
    with pytest.raises(ShapeError, match=r"base must return \(3, 4\) .* got \(3, 5\)"):
        wide(inputs(3))
    with pytest.raises(ShapeError, match=r"7"):
        layer_of()(inputs(3, features=7))
    with pytest.raises(BackendError, match=r"x"):
        layer_of()(np.ones((3, 6)))

    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x, x

    with pytest.raises(BackendError, match=r"the base's output"):
        layer_of(Pair(), in_features=6, out_features=6)(inputs(3))
    ours = tensormoe_numpy.ResidualExperts(lambda x: x[..., :2], 6, 5, experts=2, rank=1, seed=0)
    with pytest.raises(ShapeError, match=r"base must return \(3, 5\)"):
        ours(np.ones((3, 6), "float32"))
    flax = NNX.ResidualExperts(lambda x: x[..., :2], 6, 5, experts=2, rank=1, rngs=0)
    with pytest.raises(ShapeError, match=r"base must return \(3, 5\)"):
        flax(jnp.ones((3, 6)))
    key = jax.random.key(0)
    layer = EQUINOX.ResidualExperts(lambda x: x[:2], 6, 5, experts=2, rank=1, key=key)
    with pytest.raises(ShapeError, match=r"base must return \(3, 5\)"):
        layer(jnp.ones((3, 6)))


def test_files_of_others(tmp_path: Path) -> None:
    path = tmp_path / "file"
    layer_of().save_adapter(path)
    others = layer_of(base_of(7, 5), experts=3, rank=1, scale=2.0, gate=None)
    with pytest.raises(CheckpointError) as caught:
        others.load_adapter(path)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(" must be ")[0] for line in lines] == [
        "layer.spec.in_features",
        "layer.spec.experts",
        "layer.spec.rank",
        "layer.gate",
        "scale",
    ]
    with pytest.raises(SpecError, match=r"in_features must be the base's own, 7; got 6"):
        ResidualExperts.from_adapter(base_of(7, 5), path)
    numpys = tensormoe_numpy.ResidualExperts(double, 6, 6, experts=2, rank=1, seed=0)
    for load in (
        numpys.load_adapter,
        NNX.ResidualExperts(double, 6, 6, experts=2, rank=1, rngs=0).load_adapter,
        EQUINOX.ResidualExperts(
            double, 6, 6, experts=2, rank=1, key=jax.random.key(0)
        ).load_adapter,
    ):
        with pytest.raises(CheckpointError, match=r"layer.spec.out_features must be 6; got 5"):
            load(path)
        with pytest.raises(CheckpointError, match=r"name must be the path .* got 'a', and it hold"):
            load(path, "a")
    with pytest.raises(CheckpointError, match=r"must hold a MuMoE; got a ResidualExperts"):
        MuMoE.load(path)
    MuMoE(6, 5, 4, rank=2).save(path)
    with pytest.raises(CheckpointError, match=r"must hold adapters.* got a MuMoE"):
        layer_of().load_adapter(path)
    good = layer_of().config.to_dict()
    damaged: list[tuple[Any, str]] = [
        ({}, r"must describe its modules"),
        ({"modules": {}}, r"must describe its modules"),
        ({"modules": {"": {"layer": good["layer"]}}}, r"at '': a residual mixture's config"),
        ({"modules": {"": good | {"scale": 0}}}, r"scale must be"),
        ({"modules": {"": good}}, r"'adapter.factors.input' \(6, 2\) is missing"),
    ]
    for config, message in damaged:
        save_checkpoint(path, "ResidualExperts", config, {"a": np.ones(3)})
        with pytest.raises(CheckpointError, match=message):
            layer_of().load_adapter(path)


def test_descriptions() -> None:
    config = residual_config(double, 6, 5, Options((2, 3), "tucker", rank=2), 0.5)
    assert ResidualConfig.from_dict(config.to_dict()) == config
    shapes = {**config.parameter_shapes(), **config.buffer_shapes()}
    assert set(shapes) == {f"adapter.{name}" for name in config.layer.parameter_shapes()}
    assert config.num_parameters == sum(np.prod(shape) for shape in shapes.values())


def test_any_mixture_may_be_the_base() -> None:
    sparse = SparseMoE(6, 8, 5, experts=4, top_k=2)
    layer = layer_of(sparse)
    assert torch.equal(layer(inputs(2, 3)), sparse(inputs(2, 3)))
    with pytest.raises(SpecError, match=r"got a SparseMoE"):
        layer.merge(torch.ones(4))
