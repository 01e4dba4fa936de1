"""Blocks on eight devices: hidden features stay where they are, with one sum per block."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from tensormoe import Gate, LayerSpec
from tensormoe.errors import BackendError, ShapeError, SpecError
from tensormoe.functional import BlockConfig, LayerConfig, Options
from tensormoe.mixtures import soft_config, sparse_config
from tensormoe_jax import apply, initialize, partition_specs, train
from tensormoe_jax._exchange import exchanged as moved
from tensormoe_jax._exchange import rounds
from tests.jax._eight import (
    KINDS,
    P,
    check,
    exchanged,
    mesh_of,
    predicted,
    put,
    random,
    refused,
    same,
    values,
)

HIDDEN = {"hidden": "model"}
# compiles in a fraction of the time that the search of a root takes
SOFTMAX = Gate("softmax")
X = random((8, 12), 70)


def block_of(kind: Any = "cp", gated: bool = False, drop: float = 0.0) -> BlockConfig:
    options = Options((4, 2), KINDS.get(kind, kind), gate=SOFTMAX)
    return options.block(12, 16, 10, "tanh", drop, gated=gated)


def moderate(config: Any) -> dict[str, Any]:
    """Values for which an activation is not saturated, whose slope would be rounding."""
    return {name: 0.25 * each for name, each in values(config).items()}


def squared(config: Any, legs: Any, parameters: Any, x: Any) -> Any:
    y = apply(config, parameters, x, legs=legs)
    return (y**2).sum(), y


def slices(config: BlockConfig, devices: int) -> list[tuple[str, int]]:
    """Exchanges of a gated block's first layer: two slices per array, twice."""
    part, found = config.first.shard("o", devices).spec.network, []
    for factor in part.all_factors if config.gated else ():
        if "o" in factor.legs:
            size = 4 * int(np.prod(part.shape(factor))) // 2
            # forward, and backward
            found += [("collective-permute", size)] * 4
    return found


def on_devices(kind: Any, gated: bool, devices: int) -> None:
    config = block_of(kind, gated)
    parameters, mesh = moderate(config), mesh_of(model=devices)
    want = jax.jit(jax.grad(partial(squared, config, None), (0, 1), has_aux=True))(parameters, X)
    with jax.set_mesh(mesh):
        placed = put(mesh, parameters, partition_specs(config, HIDDEN))
        step = jax.jit(jax.grad(partial(squared, config, HIDDEN), (0, 1), has_aux=True))
        compiled = step.lower(placed, X).compile()
        same(compiled(placed, X), want, 2e-6)
        lowered = jax.jit(partial(apply, config, legs=HIDDEN)).lower(placed, X).as_text()
    assert lowered.count("stablehlo.all_reduce") == 1
    wanted = sorted(
        predicted(config.shard(devices).cost(8, training=True)) + slices(config, devices)
    )
    assert exchanged(compiled.as_text()) == wanted, exchanged(compiled.as_text())
    part = config.shard(devices).parameter_shapes()
    for name, array in placed.items():
        assert {each.data.shape for each in array.addressable_shards} == {part[name]}, name


for each in KINDS:
    check(f"{each} block", wide=each != "tensor_ring")(partial(on_devices, each, False, 2))
    check(f"gated {each} block", wide=each != "hadamard")(partial(on_devices, each, True, 4))
for gated in (False, True):
    check(f"block of 8 devices, gated {gated}")(partial(on_devices, "cp", gated, 8))


@check("slices of both halves")
def _() -> None:
    for devices in range(1, 9):
        first, second = rounds(devices)
        assert sorted(first + second) == list(range(2 * devices))
        for each in (first, second):
            # everybody sends one piece and receives one
            assert {piece // 2 for piece in each} == {piece % devices for piece in each}
            assert len(each) == devices
    for devices in (2, 3, 8):
        whole = random((2, 6 * devices), devices)
        run = jax.shard_map(
            lambda array: moved(array, 1, "model"),
            mesh=mesh_of(model=devices),
            in_specs=P(None, "model"),
            out_specs=P(None, "model"),
        )
        halves = np.split(np.asarray(whole), 2, axis=1)
        parts = [np.split(half, devices, axis=1) for half in halves]
        wanted = [np.concatenate(pair, 1) for pair in zip(*parts, strict=True)]
        same(jax.jit(run)(whole), np.concatenate(wanted, 1), 0.0)


def two_axes(explicit: bool) -> None:
    for gated in (False, True):
        config = block_of("tensor_ring", gated, drop=0.25)
        parameters, mesh = moderate(config), mesh_of(explicit, data=2, model=4)

        def loss(legs: Any, parameters: Any, x: Any, config: Any = config) -> Any:
            y, _ = train(config, parameters, x, key=jax.random.key(5), legs=legs)
            return (y**2).sum(), y

        # the same entries are dropped
        want = jax.jit(jax.grad(partial(loss, None), (0, 1), has_aux=True))(parameters, X)
        with jax.set_mesh(mesh):
            placed = put(mesh, parameters, partition_specs(config, HIDDEN))
            rows = jax.device_put(X, NamedSharding(mesh, P("data")))
            for legs in (HIDDEN, None) if explicit else (HIDDEN,):
                run = jax.jit(jax.grad(partial(loss, legs), (0, 1), has_aux=True))
                same(run(placed, rows), want, 2e-6)


check("blocks on two automatic axes")(partial(two_axes, False))
check("blocks on two explicit axes")(partial(two_axes, True))


@check("blocks inside of a shard_map")
def _() -> None:
    for gated in (False, True):
        config = block_of("cp", gated, drop=0.25)
        parameters, mesh = moderate(config), mesh_of(data=2, model=4)
        specs = partition_specs(config, HIDDEN)

        def total(legs: Any, parameters: Any, x: Any, config: Any = config) -> Any:
            y, _ = train(config, parameters, x, key=jax.random.key(5), legs=legs)
            loss = (y**2).sum()
            return jax.lax.psum(loss, "data") if legs else loss

        rows = jnp.concatenate([X, X])  # with equal keys on the axis `data`, equal drops
        want = jax.jit(jax.value_and_grad(partial(total, None)))(parameters, X)
        mapped = jax.shard_map(
            partial(total, HIDDEN), mesh=mesh, in_specs=(specs, P("data")), out_specs=P()
        )
        found = jax.jit(jax.value_and_grad(mapped))(parameters, rows)
        same(jax.tree.map(lambda each: each / 2, found), want, 2e-6)


@check("ten training steps of a gated block")
def _() -> None:
    config = block_of("cp", gated=True, drop=0.1)
    adam, target = optax.adam(1e-2), random((8, 10), 71)
    start, mesh = initialize(config, jax.random.key(0)), mesh_of(data=2, model=4)

    def step(legs: Any, carried: Any, x: Any, key: Any) -> Any:
        parameters, state = carried

        def loss(parameters: Any) -> Any:
            return ((train(config, parameters, x, key=key, legs=legs)[0] - target) ** 2).mean()

        value, slope = jax.value_and_grad(loss)(parameters)
        moves, state = adam.update(slope, state)
        return (optax.apply_updates(parameters, moves), state), value

    def ten(legs: Any, parameters: Any, x: Any) -> Any:
        run, carried, losses = jax.jit(partial(step, legs)), (parameters, adam.init(parameters)), []
        for place in range(10):
            carried, value = run(carried, x, jax.random.key(place))
            losses.append(value)
        return carried[0], losses

    want = ten(None, start, X)
    assert want[1][-1] < want[1][0]
    with jax.set_mesh(mesh):
        placed = put(mesh, start, partition_specs(config, HIDDEN))
        same(ten(HIDDEN, placed, jax.device_put(X, NamedSharding(mesh, P("data")))), want, 1e-5)


@check("an activation of its own")
def _() -> None:
    config, mesh = block_of(), mesh_of(model=2)
    config = BlockConfig(config.first, config.second, None)
    parameters = moderate(config)

    def loss(legs: Any, parameters: Any, slope: Any) -> Any:
        def act(array: Any) -> Any:
            return jnp.where(array > 0, array, slope * array)

        return (apply(config, parameters, X, act=act, legs=legs) ** 2).sum()

    want = jax.jit(jax.value_and_grad(partial(loss, None), (0, 1)))(parameters, 0.25)
    with jax.set_mesh(mesh):
        placed = put(mesh, parameters, partition_specs(config, HIDDEN))
        run = jax.jit(jax.value_and_grad(partial(loss, HIDDEN), (0, 1)))
        same(run(placed, jnp.float32(0.25)), want, 2e-6)


def mixture(config: Any, legs: Any) -> None:
    from tensormoe_jax._mixtures import forward_mixture

    parameters, mesh = moderate(config), mesh_of(data=2, model=2)
    specs = partition_specs(config, legs)
    assert any(any(spec) for spec in specs.values())
    x = random((4, 6, 16), 72)

    def loss(parameters: Any, x: Any) -> Any:
        y, _ = forward_mixture(config, parameters, x)
        return (y**2).sum(), y

    step = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    want = step(parameters, x)
    with jax.set_mesh(mesh):
        placed = put(mesh, parameters, specs)
        same(step(placed, jax.device_put(x, NamedSharding(mesh, P("data")))), want, 1e-5)


MIXTURES = {
    "sparse": sparse_config(16, 8, 12, experts=4, top_k=2, factorization="cp", rank=4),
    "soft": soft_config(16, 8, 12, experts=4, slots=2, factorization="cp", rank=4),
}
for each, config in MIXTURES.items():
    for leg in ("hidden", "n0", "r"):
        name = f"{each} mixture, leg {leg}"
        check(name, wide=(each, leg) != ("sparse", "hidden"))(
            partial(mixture, config, {leg: "model"})
        )


@check("what is refused")
def _() -> None:
    config = LayerConfig(LayerSpec(12, 10, 6, KINDS["cp"]), None)
    block, given = block_of(), random((8, 6), 73)
    parameters, mesh = moderate(config), mesh_of(data=2, model=4)

    def call(legs: Any, layer: Any = config, own: Any = parameters) -> Any:
        return apply(layer, own, X, given, legs=legs)

    model = {"r": "model"}
    refused(SpecError, "a mesh must be set for legs; got {'r': 'model'}", lambda: call(model))
    with jax.set_mesh(mesh):
        for legs, message in (
            ({"r": "rows"}, "must have the axis that leg 'r' is cut over; got 'rows'"),
            ({"z": "model"}, "leg must be one of 'n0', 'i', 'o', 'r'; got 'z'"),
            ({"o": "model"}, "multiple of the 4 devices; got 10 for leg 'o'"),
            ({"r": "model", "o": "data"}, "legs must be one, since a layer is cut along one leg"),
            ({}, "legs must be one"),
            ("r", "legs must name a leg and a mesh axis; got 'r'"),
            ({"r": 3}, "legs must name a leg and a mesh axis"),
        ):
            refused(SpecError, message, partial(call, legs))
        refused(
            SpecError,
            "the leg of a block must be 'hidden', which is between its layers; got 'r'",
            lambda: call(model, block, moderate(block)),
        )
        refused(
            ShapeError,
            "factors.input must have shape",
            lambda: call(
                model, own={**parameters, "factors.input": parameters["factors.input"][:, :3]}
            ),
        )
    refused(SpecError, "got 'z'", lambda: partition_specs(config, {"z": "model"}))
    refused(SpecError, "must be 'hidden'", lambda: partition_specs(block, model))
    refused(
        SpecError,
        "the leg of a mixture must be one of its layers'",
        lambda: partition_specs(MIXTURES["sparse"], {"z": "model"}),
    )

    def mapped(spec: Any, rows: Any = None, **options: Any) -> Any:
        def run(own: Any, x: Any) -> Any:
            return apply(config, own, x, given[: len(x)], legs=model)

        ins = spec, rows or P()
        return jax.shard_map(run, mesh=mesh, in_specs=ins, out_specs=P(), **options)(parameters, X)

    specs = partition_specs(config, model)
    refused(
        ShapeError,
        "x must be the same on all devices of the mesh axis 'model'",
        lambda: mapped(specs, P("model")),
    )
    refused(
        SpecError,
        "shard_map must check what varies over the axis 'model'; got check_vma=False",
        lambda: mapped(specs, check_vma=False),
    )
    # slices of another number of devices
    message = "factors.expert_0 must have shape (6, 3); got (6, 12)"
    refused(ShapeError, message, lambda: mapped(P()))
    with jax.set_mesh(mesh):
        for legs in (model, None):
            message = "parameters must be arrays of JAX"
            refused(BackendError, message, lambda legs=legs: call(legs, own=3))
            refused(SpecError, "config must be that of a layer", lambda legs=legs: call(legs, 3))
