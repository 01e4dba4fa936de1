"""Soft mixtures against plain NumPy: weights, slots, masks, and experts that are selected."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_numpy
import tensormoe_torch
from tensormoe import CP, BaseDelta, Hadamard, SharedBasis, TensorRing, Tucker
from tensormoe.errors import BackendError, GateError, PlanError, ShapeError, SpecError
from tensormoe.functional import EachExpert
from tensormoe.mixtures import SoftConfig, soft_config
from tensormoe.routing import SoftRoutes, select_experts, soft_routes

FACTORIZATIONS = {
    "dense": "dense",
    "cp": CP(3),
    "ring": TensorRing((2, 3, 2)),
    "tucker": Tucker((2, 3, 3)),
    "hadamard": Hadamard(),
    "shared basis": SharedBasis(2),
    "base and deltas": BaseDelta(2),
}


def _layer(factorization: Any = "dense", **options: Any) -> tensormoe_numpy.SoftMoE:
    options = {"experts": 4, "slots": 2, "bias": True, "dtype": "float64", "seed": 0} | options
    layer = tensormoe_numpy.SoftMoE(6, 7, 5, factorization=factorization, **options)
    rng = np.random.default_rng(5)
    # biases start at zero, and the scale at one
    layer.parameters |= {
        name: array + 0.5 * rng.standard_normal(array.shape)
        for name, array in layer.parameters.items()
    }
    return layer


def _x(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((*shape, 6))


def _softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def _gelu(x: np.ndarray) -> np.ndarray:
    return torch.nn.functional.gelu(torch.tensor(x)).numpy()


def _expert(layer: tensormoe_numpy.SoftMoE, n: int, slot: np.ndarray) -> np.ndarray:
    """One expert's output, from its matrices."""
    for role in ("up_proj", "down_proj"):
        prefix = f"experts.projections.{role}."
        config = layer.config.layers[prefix[:-1]]
        arrays = {k.removeprefix(prefix): v for k, v in layer.parameters.items() if prefix in k}
        matrix, bias = tensormoe_numpy.MuMoE.restore(config, arrays).expert(n)
        slot = slot @ matrix + bias
        slot = _gelu(slot) if role == "up_proj" else slot
    return slot


def _by_loops(
    layer: tensormoe_numpy.SoftMoE, x: np.ndarray, kept: list[int] | None = None
) -> np.ndarray:
    """The layer's outputs for one set, slot by slot, of some experts alone."""
    tokens, phi = x, layer.parameters["router.projection"]
    if layer.config.normalize:
        tokens = x / np.linalg.norm(x, axis=1, keepdims=True)
        phi = phi / np.linalg.norm(phi, axis=0) * layer.parameters["router.scale"]
    logits = np.einsum("ti,inp->tnp", tokens, phi)
    count, p = logits.shape[1:]
    combine = _softmax(logits.reshape(len(x), -1), 1).reshape(logits.shape)
    y = np.zeros((len(x), layer.out_features))
    for n in range(count) if kept is None else kept:
        for s in range(p):
            slot = _softmax(logits[:, n, s], 0) @ x
            y += combine[:, n, s, None] * _expert(layer, n, slot)
    return y


@pytest.mark.parametrize("factorization", FACTORIZATIONS.values(), ids=FACTORIZATIONS.keys())
@pytest.mark.parametrize("normalize", [True, False])
def test_slot_by_slot(factorization: Any, normalize: bool) -> None:
    layer, x = _layer(factorization, normalize=normalize), _x(3, 5)
    wanted = np.stack([_by_loops(layer, each) for each in x])
    # the square root of squares + 1e-6 is no norm, but close to it
    np.testing.assert_allclose(layer(x), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    for k in (1, 3):
        index = select_experts(layer.route(x).combine, k)
        some = [_by_loops(layer, each, [*kept]) for each, kept in zip(x, index, strict=True)]
        found = layer.select(x, k)
        np.testing.assert_allclose(found, np.stack(some), rtol=0, atol=1e-5 * np.abs(some).max())
    np.testing.assert_array_equal(layer.select(x, 4), layer(x))


def test_weights() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 5, 3, 2)) * 30
    routes = soft_routes(logits)
    np.testing.assert_allclose(routes.dispatch.sum(1), 1.0)
    np.testing.assert_allclose(routes.combine.sum((2, 3)), 1.0)
    np.testing.assert_allclose(routes.dispatch, _softmax(logits, 1))
    flat = _softmax(logits.reshape(2, 5, 6), 2).reshape(logits.shape)
    np.testing.assert_allclose(routes.combine, flat)
    wide = soft_routes(np.full((1, 2, 1, 1), 1e300))
    assert np.all(wide.dispatch == 0.5)
    assert np.all(wide.combine == 1.0)


def test_masked_tokens_have_no_part_in_anything() -> None:
    layer, x = _layer(), _x(2, 5)
    mask = np.ones((2, 5), bool)
    mask[0, 3:] = False
    padded = x.copy()
    padded[0, 3], padded[0, 4] = np.inf, 1e200
    found = layer(padded, mask=mask)
    np.testing.assert_allclose(found[0, :3], layer(x[0, :3]), rtol=1e-12)
    np.testing.assert_allclose(found[1], layer(x[1]), rtol=1e-12)
    assert not found[0, 3:].any()
    np.testing.assert_allclose(
        layer.select(padded, 2, mask=mask)[0, :3], layer.select(x[0, :3], 2), rtol=1e-12
    )
    routes = layer.route(padded, mask)
    np.testing.assert_array_equal(layer(padded, routes, mask=mask), found)


def test_a_set_without_tokens_that_count_is_zero_and_has_no_gradient() -> None:
    layer = tensormoe_torch.SoftMoE(6, 7, 5, experts=4)
    mask = torch.tensor([[False, False, False], [True, True, False]])
    x = torch.randn(2, 3, 6)
    x[0] = torch.nan
    x.requires_grad_()
    y = layer(x, mask=mask)
    assert not y[0].any()
    assert y[1, :2].all()
    y.square().sum().backward()
    assert x.grad is not None
    assert not x.grad[0].any()
    assert x.grad[1, :2].all()
    assert all(each.grad.isfinite().all() for each in layer.parameters() if each.grad is not None)
    routes = layer.route(x, mask)
    assert not routes.dispatch[0].any()
    assert not routes.combine[0].any()


def test_masks_everywhere() -> None:
    ours, x = _layer(), _x(2, 4)
    mask = np.array([[True, False, True, True], [False] * 4])
    wanted, some = ours(x, mask=mask), ours.select(x, 2, mask=mask)
    with jax.enable_x64(True):
        arrays = {name: jax.numpy.asarray(each) for name, each in ours.arrays.items()}
        given, counts = jax.numpy.asarray(x), jax.numpy.asarray(mask)
        for package in (tensormoe_jax.nnx, tensormoe_jax.equinox):
            module = package.SoftMoE.restore(ours.config, arrays)
            np.testing.assert_allclose(module(given, mask=counts), wanted, atol=1e-12)
            np.testing.assert_allclose(module.select(given, 2, mask=counts), some, atol=1e-12)


@pytest.mark.parametrize("factorization", ["dense", CP(3)])
def test_select_runs_only_what_it_keeps(factorization: Any) -> None:
    layer = tensormoe_torch.SoftMoE(32, 64, experts=16, bias=False, factorization=factorization)
    x = torch.randn(20, 4, 32)

    def work(k: int | None) -> tuple[int, int]:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(x) if k is None else layer.select(x, k)
        total = counter.get_total_flops()
        router = 2 * 20 * 4 * 32 * 16 * (1 + 2 * (1 if k is None else k / 16))
        return total, total - int(router)

    (whole, experts), (few, kept) = work(None), work(2)
    assert kept <= experts / 8
    assert few < whole / 2


def test_random_experts() -> None:
    layer, x = _layer(), _x(50, 3)
    one, same, other = (layer.select(x, 1, random=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    routes = layer.route(x)
    picks = [_by_loops(layer, x[0], [n]) for n in range(4)]
    close = [np.abs(one[0] - each).max() < 1e-4 for each in picks]
    assert sum(close) == 1
    assert not np.array_equal(one, layer.select(x, 1, routes))
    module = tensormoe_torch.SoftMoE(6, 7, 5, experts=4)
    given = torch.tensor(x, dtype=torch.float32)
    drawn = [module.select(given, 2, random=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_selection_by_mass() -> None:
    combine = np.random.default_rng(0).random((3, 5, 7, 2))
    mass = combine.sum((1, 3))
    for k in (1, 3, 7):
        np.testing.assert_array_equal(select_experts(combine, k), np.argsort(-mass)[:, :k])
    for k in (0, 8, True, 2.0):
        with pytest.raises(GateError, match="k must be"):
            select_experts(combine, k)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="combine must have shape"):
        select_experts(combine[0], 1)


def test_noise_in_training_alone() -> None:
    layer = tensormoe_torch.SoftMoE(6, 7, 5, experts=4, noise=1.0)
    x = torch.randn(2, 3, 6)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    ours = _layer(noise=0.5)
    drawn = np.random.default_rng(0).standard_normal((2, 3, 4, 2))
    quiet = ours.route(x.double().numpy())
    routes, _ = ours.config.route(ours._parts, x.double().numpy(), training=True, noise=drawn)
    np.testing.assert_allclose(routes.logits, quiet.logits + 0.5 * drawn)
    with pytest.raises(GateError, match=r"noise=0\.5 needs a source of random numbers"):
        ours.config.route(ours._parts, x.double().numpy(), training=True)
    arrays = {name: jax.numpy.asarray(each, "float32") for name, each in ours.arrays.items()}
    flax = tensormoe_jax.nnx.SoftMoE.restore(ours.config, arrays)
    with pytest.raises(GateError, match="needs random numbers in training"):
        flax(jax.numpy.asarray(x.numpy()))
    equinox = tensormoe_jax.equinox.SoftMoE.restore(ours.config, arrays)
    with pytest.raises(SpecError, match="noise needs a key in training"):
        equinox(jax.numpy.asarray(x.numpy()))


def test_initial_values() -> None:
    torch.manual_seed(0)
    layer = tensormoe_torch.SoftMoE(400, 3, experts=64, slots=2)
    assert tuple(layer.router.projection.shape) == (400, 64, 2)
    assert abs(layer.router.projection.std().item() * 20 - 1) < 0.02
    assert layer.router.scale.tolist() == [1.0]
    assert "scale" not in dict(
        tensormoe_torch.SoftMoE(4, 3, experts=2, normalize=False).router.named_parameters()
    )


def test_each_expert_is_one_batched_product() -> None:
    layer = tensormoe_torch.MuMoE(6, 5, 4, "dense", gate=None)
    x = torch.randn(4, 3, 6)
    with FlopCounterMode(display=False) as counter:
        y = layer(x, EachExpert())
    assert counter.get_total_flops() == 2 * 4 * 3 * 6 * 5
    assert [*counter.get_flop_counts()["Global"]] == [torch.ops.aten.bmm]
    weight, bias = layer.materialize()
    assert bias is not None
    torch.testing.assert_close(y, x @ weight + bias[:, None])
    for wrong in (x[:2], x[0, 0], x[None]):
        with pytest.raises(ShapeError, match=r"x must have shape \(4, 'rows', 6\)"):
            layer(wrong, EachExpert())


def test_every_expert_on_the_same_rows() -> None:
    x = torch.randn(3, 6)
    for kind, work in (("dense", 2 * 4 * 3 * 6 * 5), ("cp", 2 * 3 * (6 * 8 + 4 * 8 * 5))):
        options = {} if kind == "dense" else {"rank": 8}
        layer = tensormoe_torch.MuMoE(6, 5, 4, kind, gate=None, bias=False, **options)
        with FlopCounterMode(display=False) as counter:
            y = layer(x, EachExpert())
        # what does not depend on the expert is computed once
        assert counter.get_total_flops() == work
        torch.testing.assert_close(y, x @ layer.materialize()[0])


def test_levels_of_experts() -> None:
    layer = tensormoe_torch.MuMoE(6, 5, (2, 3), "cp", rank=4, gate=None)
    x = torch.randn(2, 3, 7, 6)
    weight, bias = layer.materialize()
    assert bias is not None
    torch.testing.assert_close(layer(x, EachExpert()), x @ weight + bias[:, :, None])


def test_autocast_and_narrow_inputs() -> None:
    layer = tensormoe_torch.SoftMoE(8, 7, experts=4)
    x = torch.randn(2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert layer.route(x).logits.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.02)
    narrow = tensormoe_torch.SoftMoE(8, 7, experts=4, dtype=torch.bfloat16)
    routes = narrow.route(x.bfloat16())
    assert routes.combine.dtype == routes.dispatch.dtype == torch.float32
    assert narrow(x.bfloat16()).dtype == torch.bfloat16


def test_costs_follow_the_sets() -> None:
    layer = tensormoe_torch.SoftMoE(32, 64, experts=8, slots=2, kind="swiglu")
    x = torch.randn(6, 5, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert layer.cost(30, sets=6).matmul_flops == counter.get_total_flops()
    assert layer.cost(30).flops < layer.cost(30, sets=6).flops
    with FlopCounterMode(display=False) as counter:
        layer(x.requires_grad_()).sum().backward()
    assert layer.cost(30, sets=6, training=True).matmul_flops == counter.get_total_flops()
    with pytest.raises(SpecError, match="sets must divide the 30 tokens"):
        layer.cost(30, sets=7)
    with pytest.raises(PlanError, match="batch must be"):
        layer.cost(-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": True}, "causal must be False .* Use SparseMoE"),
        ({"causal": 1}, "causal must be"),
        ({"slots": 0}, "slots must be"),
        ({"normalize": 1}, "normalize must be"),
        ({"noise": -1.0}, "noise must be a number that is not negative"),
        ({"noise": float("nan")}, "noise must be"),
        ({"experts": 0}, "experts must be"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        soft_config(6, 7, None, **{"experts": 4, **options})


def test_bad_input() -> None:
    layer, x = _layer(), _x(2, 3)
    with pytest.raises(ShapeError, match=r"x must have shape \(\.\.\., tokens, 6\)"):
        layer(x[0, 0])
    for mask in (np.ones((2, 4), bool), np.ones((2, 3)), np.ones(3, bool)):
        with pytest.raises(ShapeError, match=r"mask must be booleans of shape \(2, 3\)"):
            layer(x, mask=mask)
    with pytest.raises(BackendError, match="mask"):
        layer(x, mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(GateError, match="logits must not be NaN"):
        layer(x * np.nan)
    for k in (0, 5):
        with pytest.raises(GateError, match="k must be"):
            layer.select(x, k)
    with pytest.raises(ShapeError, match="routes must be the record"):
        layer.select(x, 1, layer.route(_x(2, 4)))
    with pytest.raises(GateError, match=r"logits must be a floating-point array"):
        soft_routes(x)
    with pytest.raises(GateError, match=r"mask must be booleans"):
        soft_routes(x[..., None], mask=np.ones((2, 3)))


def test_sets_without_tokens() -> None:
    layer = _layer()
    for shape in ((0, 4), (3, 0), (0,), (2, 0, 3)):
        assert layer(_x(*shape)).shape == (*shape, 5)
        assert layer.select(_x(*shape), 2).shape == (*shape, 5)


def test_records_are_values_of_transformations() -> None:
    module = tensormoe_jax.nnx.SoftMoE(6, 7, 5, experts=4, rngs=0)
    routes = jax.eval_shape(module.route, jax.ShapeDtypeStruct((2, 3, 6), "float32"))
    assert isinstance(routes, SoftRoutes)
    assert routes.combine.shape == (2, 3, 4, 1)
    assert isinstance(module.config, SoftConfig)
