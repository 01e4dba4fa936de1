"""Layers on eight devices: one device's results, and what the cost model says of communication."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from tensormoe import CP, Gate, LayerSpec, TensorRing
from tensormoe.backend import get_backend
from tensormoe.functional import LayerConfig, apply_experts, experts_vjp
from tensormoe.gates import OneExpert, TopK
from tensormoe_jax import apply, initial_buffers, initialize, partition_specs, train
from tests.jax._eight import (
    KINDS,
    P,
    check,
    exchanged,
    mesh_of,
    predicted,
    put,
    random,
    same,
    shares,
    values,
)

NUMPY = get_backend("numpy")
SIZES = 16, 24, (8, 4)
X, Y = random((6, 16), 50), random((6, 24), 51)


def config_of(kind: Any, **options: Any) -> LayerConfig:
    return LayerConfig(LayerSpec(*SIZES, kind), None, **options)


def weighted(config: LayerConfig, legs: Any, parameters: Any, x: Any, given: Any) -> Any:
    """A loss whose gradient by the output is known, and the output."""
    y = apply(config, parameters, x, given, legs=legs)
    return (y * Y).sum(), y


def reference(config: LayerConfig, arrays: Any, given: Any) -> tuple[Any, Any]:
    """Output and gradients of the whole layer, in float64."""
    wide = jax.tree.map(lambda each: np.asarray(each, np.float64), (arrays, X, given, Y))
    arrays, x, given, cotangent = wide
    y, back = experts_vjp(config, arrays, x, given, NUMPY)
    found = back(cotangent)
    levels = [found[f"coefficients_{level}"] for level in range(len(given))]
    return ({name: found[name] for name in arrays}, found["x"], levels), y


def slopes(config: LayerConfig, legs: Any, mesh: Any, arrays: Any, given: Any) -> tuple[Any, str]:
    """Gradients and output of a layer that is cut, and the compiled program."""
    leg = next(iter(legs))
    placed = put(mesh, arrays, partition_specs(config, {leg: "model"}))
    with jax.set_mesh(mesh):
        run = partial(weighted, config, legs if legs[leg] else None)
        step = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))
        compiled = step.lower(placed, X, given).compile()
        return compiled(placed, X, given), compiled.as_text()


def legs_of(config: LayerConfig, devices: int) -> list[str]:
    network = config.spec.network
    return [leg for leg in network.shardable_legs if network.sizes[leg] % devices == 0]


def every_leg(name: str, devices: int) -> None:
    config = config_of(KINDS[name])
    arrays, given = values(config), shares(SIZES[2], 6)
    want, mesh = reference(config, arrays, given), mesh_of(model=devices)
    for leg in legs_of(config, devices):
        found, text = slopes(config, {leg: "model"}, mesh, arrays, given)
        # with float64, of which a network of six factors in float32 may be this far
        same(found, want, 1e-6 if devices == 2 else 3e-6)
        part = config.shard(leg, devices)
        wanted = predicted(part.cost(6, training=True))
        if leg.startswith("n"):
            # whoever makes coefficients needs their gradients whole
            wanted = sorted([*wanted, ("all-gather", 4 * 6 * config.spec.network.sizes[leg])])
        assert exchanged(text) == wanted, (leg, exchanged(text))
        forward = jax.jit(partial(apply, config, legs={leg: "model"}))
        with jax.set_mesh(mesh):
            placed = put(mesh, arrays, partition_specs(config, {leg: "model"}))
            lowered = forward.lower(placed, X, given).as_text()
        assert lowered.count("stablehlo.all_reduce") == (leg != "o"), leg
        assert lowered.count("all_gather") == lowered.count("all_to_all") == 0, leg


def by_the_compiler(name: str, devices: int) -> None:
    """The same arrays without legs: whatever the compiler communicates, results are right."""
    config = config_of(KINDS[name])
    arrays, given = values(config), shares(SIZES[2], 6)
    want, mesh = reference(config, arrays, given), mesh_of(model=devices)
    for leg in legs_of(config, devices):
        same(slopes(config, {leg: None}, mesh, arrays, given)[0], want)


for each in KINDS:
    check(f"{each} on 2 devices")(partial(every_leg, each, 2))
    for count in (4, 8):
        check(f"{each} on {count} devices", wide=True)(partial(every_leg, each, count))
    check(f"{each} by the compiler", wide=each != "tensor_ring")(partial(by_the_compiler, each, 2))


GATED = LayerConfig(LayerSpec(16, 8, 8, CP(8)), Gate())
ROWS = random((8, 16), 52)


# compiles in a fraction of the time that the search of a root takes
QUICK = LayerConfig(GATED.spec, Gate("softmax"))


def squared(config: Any, legs: Any, parameters: Any, x: Any) -> Any:
    y = apply(config, parameters, x, legs=legs)
    return (y**2).sum(), y


def two_axes(explicit: bool) -> None:
    parameters = values(GATED)
    want = jax.jit(jax.grad(partial(squared, GATED, None), (0, 1), has_aux=True))(parameters, ROWS)
    mesh = mesh_of(explicit, data=2, model=4)
    for leg in ("r", "o", "n0", "i"):
        legs = {leg: "model"}
        placed = put(mesh, parameters, partition_specs(GATED, legs))
        rows = jax.device_put(ROWS, NamedSharding(mesh, P("data")))
        with jax.set_mesh(mesh):
            # types say how arrays lie on explicit axes
            for named in (legs, None) if explicit else (legs,):
                run = jax.jit(jax.grad(partial(squared, GATED, named), (0, 1), has_aux=True))
                same(run(placed, rows), want)
            forward = jax.jit(partial(apply, GATED, legs=legs)).lower(placed, rows).compile()
        # rows of each device of the axis `data`, and no talk in the gate
        kinds = [] if leg == "o" else [("all-reduce", 4 * 4 * 8)]
        assert exchanged(forward.as_text()) == kinds, (leg, exchanged(forward.as_text()))


check("two automatic axes")(partial(two_axes, False))
check("two explicit axes")(partial(two_axes, True))


@check("explicit axes, rows on both")
def _() -> None:
    parameters, mesh = values(QUICK), mesh_of(True, data=2, model=4)
    want = jax.jit(partial(apply, QUICK))(parameters, ROWS)
    rows = jax.device_put(ROWS, NamedSharding(mesh, P(("data", "model"))))
    with jax.set_mesh(mesh):
        placed = put(mesh, parameters, partition_specs(QUICK, {"r": "model"}))
        same(jax.jit(partial(apply, QUICK))(placed, rows), want)


@check("explicit axes, the same rows everywhere")
def _() -> None:
    parameters, mesh = values(QUICK), mesh_of(True, data=2, model=4)
    want = jax.jit(jax.grad(partial(squared, QUICK, None), (0, 1), has_aux=True))(parameters, ROWS)
    with jax.set_mesh(mesh):
        placed = put(mesh, parameters, partition_specs(QUICK, {"o": "model"}))
        step = jax.jit(jax.grad(partial(squared, QUICK, {"o": "model"}), (0, 1), has_aux=True))
        same(step(placed, ROWS), want)


@check("inside of a shard_map")
def _() -> None:
    parameters, mesh = values(QUICK), mesh_of(data=2, model=4)
    want = jax.jit(jax.grad(partial(squared, QUICK, None), (0, 1), has_aux=True))(parameters, ROWS)
    for leg in ("r", "o", "n0", "i"):
        specs = partition_specs(QUICK, {leg: "model"})
        out = P("data", "model") if leg == "o" else P("data")

        def total(parameters: Any, x: Any, leg: str = leg) -> Any:
            loss, y = squared(QUICK, {leg: "model"}, parameters, x)
            return jax.lax.psum(loss, ("data", "model") if leg == "o" else "data"), y

        ins = specs, P("data")
        mapped = jax.shard_map(total, mesh=mesh, in_specs=ins, out_specs=(P(), out))
        same(jax.jit(jax.grad(mapped, (0, 1), has_aux=True))(parameters, ROWS), want)
        inner = jax.shard_map(
            jax.grad(total, (0, 1), has_aux=True), mesh=mesh, in_specs=ins, out_specs=(ins, out)
        )
        same(jax.jit(inner)(parameters, ROWS), want)
    # over one axis by the user, over the other by the layer
    with jax.set_mesh(mesh):
        nested = jax.shard_map(
            partial(apply, QUICK, legs={"r": "model"}),
            in_specs=(P(), P("data")),
            out_specs=P("data"),
            axis_names={"data"},
        )
        same(jax.jit(nested)(parameters, ROWS), want[1])


@check("a slice of the input, inside of a shard_map")
def _() -> None:
    parameters, made = values(QUICK), [random((8, 8), 53)]
    want = jax.jit(partial(apply, QUICK))(parameters, ROWS, made)
    for devices in (1, 4):
        run = jax.shard_map(
            lambda own, x: apply(QUICK, own, x, made, legs={"i": "model"}),
            mesh=mesh_of(model=devices),
            in_specs=(partition_specs(QUICK, {"i": "model"}), P(None, "model")),
            out_specs=P(),
        )
        same(jax.jit(run)(parameters, ROWS), want)


@check("types that say something else")
def _() -> None:
    # two legs over one axis, which is for JAX to run
    parameters, mesh = values(QUICK), mesh_of(True, model=4)
    want = jax.jit(partial(apply, QUICK))(parameters, ROWS)
    with jax.set_mesh(mesh):
        parameters["factors.output"] = jax.device_put(parameters["factors.output"], P("model"))
        parameters["factors.bias"] = jax.device_put(parameters["factors.bias"], P("model"))
        same(jax.jit(partial(apply, QUICK))(parameters, ROWS), want)


@check("chosen experts")
def _() -> None:
    config, rng, mesh = config_of(KINDS["cp"]), np.random.default_rng(3), mesh_of(model=2)
    arrays = values(config)
    chosen = [
        TopK(
            jnp.asarray(np.stack([rng.permutation(n)[:2] for _ in range(6)])),
            jnp.asarray(rng.standard_normal((6, 2)), jnp.float32),
        )
        for n in SIZES[2]
    ]
    one = [OneExpert(jnp.asarray(rng.integers(0, n, 6))) for n in SIZES[2]]
    for given, legs in ((chosen, ("r", "n0", "i", "o")), (one, ("r", "o"))):
        run = jax.grad(partial(weighted, config, None), (0, 1, 2), has_aux=True, allow_int=True)
        want = jax.jit(run)(arrays, X, given)
        want = jax.tree.map(lambda each: each if each.dtype == jnp.float32 else jnp.zeros(1), want)
        for leg in legs:
            with jax.set_mesh(mesh):
                placed = put(mesh, arrays, partition_specs(config, {leg: "model"}))
                cut = partial(weighted, config, {leg: "model"})
                run = jax.grad(cut, (0, 1, 2), has_aux=True, allow_int=True)
                compiled = jax.jit(run).lower(placed, X, given).compile()
                found = compiled(placed, X, given)
            kept = jax.tree.map(
                lambda each: each if each.dtype == jnp.float32 else jnp.zeros(1), found
            )
            same(kept, want)
            if given is chosen:
                part = config.shard(leg, 2).spec.plan(6, top_k=2)
                assert exchanged(compiled.as_text()) == predicted(part.cost(training=True)), leg


@check("rows that are sorted by expert")
def _() -> None:
    config = LayerConfig(LayerSpec(64, 64, 4, KINDS["dense"]), None)
    arrays, x = values(config), random((64, 64), 55)
    indices = jnp.asarray(np.sort(np.random.default_rng(4).integers(0, 4, 64)))
    given = OneExpert(indices, jnp.bincount(indices, length=4))
    assert config.sorts(64)
    want = jax.jit(partial(apply, config))(arrays, x, given)
    for explicit in (False, True):
        mesh, legs = mesh_of(explicit, data=2, model=4), {"o": "model"}
        with jax.set_mesh(mesh):
            placed = put(mesh, arrays, partition_specs(config, legs))
            rows = jax.device_put(x, P("data"))
            same(jax.jit(partial(apply, config, legs=legs))(placed, rows, given), want)


@check("embeddings")
def _() -> None:
    mesh, ids = mesh_of(model=2), jnp.array([[0, 15, 7], [8, 3, 3]])
    for name in ("cp", "dense"):
        spec = LayerSpec(*SIZES, KINDS[name], bias=False)
        table = LayerConfig(spec, None, indexed_input=True)
        arrays = values(table)
        given = [each.reshape(2, 3, -1) for each in shares(SIZES[2], 6)]

        def loss(legs: Any, parameters: Any, given: Any, table: Any = table) -> Any:
            y = apply(table, parameters, ids, given, legs=legs)
            return (y.reshape(Y.shape) * Y).sum(), y

        want = jax.jit(jax.grad(partial(loss, None), (0, 1), has_aux=True))(arrays, given)
        for leg in legs_of(table, 2):
            with jax.set_mesh(mesh):
                placed = put(mesh, arrays, partition_specs(table, {leg: "model"}))
                run = jax.jit(jax.grad(partial(loss, {leg: "model"}), (0, 1), has_aux=True))
                same(run(placed, given), want)
        merged = [each.reshape(6, -1) for each in given]
        flat = apply_experts(table, arrays, ids.reshape(6), merged, get_backend("jax"))
        same(want[1].reshape(6, -1), flat)


@check("ten training steps")
def _() -> None:
    adam = optax.adam(1e-2)
    for gate, leg, devices in ((Gate(), "r", 8), (Gate("softmax", normalization="batch"), "n0", 4)):
        config = LayerConfig(LayerSpec(16, 8, 8, TensorRing((2, 2, 8))), gate)
        leg = "r2" if leg == "r" else leg
        target, start = random((8, 8), 60), initialize(config, jax.random.key(0))

        def step(carried: Any, legs: Any, config: Any = config, target: Any = target) -> Any:
            parameters, state, buffers = carried

            def loss(parameters: Any) -> Any:
                y, kept = train(config, parameters, ROWS, buffers=buffers, legs=legs)
                return ((y - target) ** 2).mean(), kept

            slope, kept = jax.grad(loss, has_aux=True)(parameters)
            moves, state = adam.update(slope, state)
            return optax.apply_updates(parameters, moves), state, kept

        def ten(parameters: Any, legs: Any, config: Any = config) -> Any:
            buffers = initial_buffers(config)
            run, carried = (
                jax.jit(partial(step, legs=legs)),
                (parameters, adam.init(parameters), buffers),
            )
            for _ in range(10):
                carried = run(carried)
            return carried[0], carried[2]

        want, mesh = ten(start, None), mesh_of(model=devices)
        with jax.set_mesh(mesh):
            placed = put(mesh, start, partition_specs(config, {leg: "model"}))
            found = ten(placed, {leg: "model"})
        same(found, want, 1e-5)
        part = config.shard(leg, devices)
        for name, shape in part.parameter_shapes().items():
            assert {each.data.shape for each in found[0][name].addressable_shards} == {shape}, name


@check("batches of any shape, of 16 bits, under transformations")
def _() -> None:
    parameters, mesh, legs = values(QUICK), mesh_of(model=4), {"r": "model"}
    with jax.set_mesh(mesh):
        placed = put(mesh, parameters, partition_specs(QUICK, legs))
        for shape in ((16,), (0, 16), (2, 3, 16), (2, 0, 16)):
            x = random(shape, 54)
            run = jax.jit(partial(apply, QUICK, legs=legs))
            same(run(placed, x), jax.jit(partial(apply, QUICK))(parameters, x))
        want = jax.jit(partial(apply, QUICK))(parameters, ROWS)
        mapped = jax.jit(jax.vmap(partial(apply, QUICK, legs=legs), (None, 0)))
        same(mapped(placed, ROWS), want)
        looped = jax.jit(lambda own, x: jax.lax.map(partial(apply, QUICK, own, legs=legs), x))
        same(looped(placed, ROWS), want)
        again = jax.jit(jax.checkpoint(partial(squared, QUICK, legs)))
        same(
            jax.grad(lambda own: again(own, ROWS)[0])(placed),
            jax.grad(lambda own: squared(QUICK, None, own, ROWS)[0])(parameters),
        )
        half = jax.tree.map(lambda each: each.astype(jnp.bfloat16), parameters)
        placed = put(mesh, half, partition_specs(QUICK, legs))
        run = jax.jit(partial(apply, QUICK, legs=legs))
        x = ROWS.astype(jnp.bfloat16)
        found = run(placed, x)
        assert found.dtype == jnp.bfloat16
        same(found, jax.jit(partial(apply, QUICK))(half, x), 2e-2)
        # what is summed has 16 bits, and coefficients have 32
        step = jax.jit(jax.grad(lambda own, x: (run(own, x).astype("f4") ** 2).sum(), (0, 1)))
        text = step.lower(placed, x).as_text()
        summed = [line.split("->")[-1] for line in text.splitlines() if "}) : (tensor" in line]
        assert sorted(each.strip() for each in summed) == [
            "tensor<8x16xbf16>",
            "tensor<8x8xbf16>",
            "tensor<8x8xf32>",
        ], summed
