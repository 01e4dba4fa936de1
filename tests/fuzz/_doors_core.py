"""Public functions of the core: values, planning, gates, decomposition, files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

import tensormoe
from tensormoe import CP, Budget, Gate, LayerSpec, Roofline, editing, factorizations, planning
from tensormoe.checkpoint import (
    check_arrays,
    match_arrays,
    peek_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from tensormoe.compression import Compression, compress_checkpoint, plan_compression
from tensormoe.decomposition import Search, decompose, error_curves
from tensormoe.functional import BlockConfig, LayerConfig, parameter_rules
from tensormoe.gates import (
    balanced_bias,
    entropy,
    entropy_loss,
    expert_load,
    importance_loss,
    load_balance_loss,
    top_k,
    z_loss,
)
from tensormoe_numpy import BACKEND
from tests.fuzz._doors import Door

X = np.ones((3, 8), "float32")


def spec() -> LayerSpec:
    return LayerSpec(8, 4, 3, CP(2))


def config() -> LayerConfig:
    return LayerConfig(spec(), Gate())


def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 5, 4))


def factors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal(s).astype("float32") for n, s in spec().shapes.items()}


def doors() -> Iterator[Door]:
    for each in (_values, _planning, _gates, _editing, _arrays, _decomposition, _files):
        yield from each()


def _values() -> Iterator[Door]:
    sizes = dict(in_features=8, out_features=4, experts=(3, 2))
    yield Door("LayerSpec", LayerSpec, lambda: {**sizes, "factorization": CP(2), "bias": True})
    for name, kind in factorizations.FACTORIZATIONS.items():
        if factorizations.resolve_factorization(name, _rank(name)).rank is not None:
            yield Door(name, kind, lambda: {"rank": 2})
    yield Door("LayerSpec.from_dict", LayerSpec.from_dict, lambda: {"values": spec().to_dict()})
    for field in spec().to_dict():
        yield Door(
            f"LayerSpec.from_dict[{field}]", _fields(LayerSpec.from_dict, spec), _only(field)
        )
    for field in Gate().to_dict():
        yield Door(f"Gate.from_dict[{field}]", _fields(Gate.from_dict, Gate), _only(field))
    yield Door("LayerConfig.from_dict", LayerConfig.from_dict, lambda: {"values": {}})
    yield Door("BlockConfig.from_dict", BlockConfig.from_dict, lambda: {"values": {}})
    yield Door("Gate.from_dict", Gate.from_dict, lambda: {"values": Gate().to_dict()})
    yield Door("Gate.parse", Gate.parse, lambda: {"value": "softmax"})
    yield Door(
        "initializers", lambda **given: spec().initializers(**given), lambda: {"init": "paper"}
    )
    yield Door(
        "Gate",
        Gate,
        lambda: dict(
            activation="entmax",
            alpha=1.5,
            normalization="layer",
            k=None,
            bias=False,
            spread=1.0,
            eps=1e-5,
            momentum=0.1,
            noise=0.0,
            balance=0.0,
        ),
    )
    yield Door(
        "resolve_factorization",
        factorizations.resolve_factorization,
        lambda: {"factorization": "cp", "rank": 2},
    )
    yield Door(
        "LayerConfig", LayerConfig, lambda: {"spec": spec(), "gate": Gate(), "indexed_input": False}
    )
    yield Door(
        "parameter_rules",
        parameter_rules,
        lambda: {"config": config(), "init": "variance", "directions": 20.0},
    )


def _rank(name: str) -> Any:
    return 2 if factorizations.rank_pattern(name) else None


def _only(field: str) -> Callable[[], dict[str, Any]]:
    return lambda: {field: None}


def _fields(read: Callable[[Any], Any], make: Callable[[], Any]) -> Callable[..., Any]:
    def call(**changed: Any) -> Any:
        return read({**make().to_dict(), **changed})

    return call


def _planning() -> Iterator[Door]:
    sizes = dict(in_features=8, out_features=4, experts=3)
    yield Door(
        "plan",
        lambda **given: spec().plan(**given),
        lambda: dict(batch=4, top_k=None, indexed_input=False, prepared=False, memory_limit=None),
    )
    yield Door(
        "cost",
        lambda **given: spec().cost(**given),
        lambda: dict(batch=4, gate=None, training=False, itemsize=4),
    )
    yield Door(
        "Plan.cost",
        lambda **given: spec().plan(4).cost(**given),
        lambda: dict(gate=None, training=False, itemsize=4),
    )
    yield Door(
        "Plan.describe",
        lambda **given: spec().plan(4).describe(**given),
        lambda: dict(gate=None, training=False, itemsize=4, roofline=None),
    )
    yield Door("Plan.draw", lambda **given: spec().plan(4).draw(**given), lambda: {"itemsize": 4})
    choosing: Callable[[], dict[str, Any]] = lambda: dict(  # noqa: E731
        factorization="tensor_ring", **sizes, budget="linear", bias=True, bonds=None, gate=None
    )
    yield Door("select_rank", tensormoe.select_rank, lambda: choosing() | {"objective": "capacity"})
    yield Door("rank_front", tensormoe.rank_front, choosing)
    yield Door(
        "Budget",
        Budget,
        lambda: dict(
            parameters=100, flops=None, memory=None, time=1.0, batch=4, roofline=None, itemsize=4
        ),
    )
    yield Door("Budget.parse", Budget.parse, lambda: dict(value=10, in_features=8, out_features=4))
    linear = dict(in_features=8, out_features=4, bias=True)
    yield Door("Budget.like_linear", Budget.like_linear, lambda: dict(linear))
    yield Door("Budget.like_mlp", Budget.like_mlp, lambda: {**linear, "hidden_features": 6})
    yield Door(
        "Roofline",
        Roofline,
        lambda: dict(name="a", matmul_rate=1e9, elementwise_rate=1e9, bandwidth=1e9, overhead=1e-6),
    )
    yield Door("Roofline.from_dict", Roofline.from_dict, lambda: {"values": {}})
    for name in ("linear_cost", "mlp_cost", "dense_moe_cost", "sparse_moe_cost"):
        if hasattr(planning, name):
            yield from _baseline(name)


def _baseline(name: str) -> Iterator[Door]:
    given = {
        "linear_cost": dict(in_features=8, out_features=4),
        "mlp_cost": dict(in_features=8, hidden_features=6, out_features=4),
        "dense_moe_cost": dict(in_features=8, out_features=4, experts=3),
        "sparse_moe_cost": dict(in_features=8, out_features=4, experts=3, top_k=2),
    }[name]
    yield Door(name, getattr(planning, name), lambda: {**given, "batch": 4})


def _gates() -> Iterator[Door]:
    yield Door("entmax", tensormoe.entmax, lambda: dict(logits=X, alpha=1.5, axis=-1, mask=None))
    for name in ("softmax", "sparsemax"):
        yield Door(name, getattr(tensormoe, name), lambda: dict(logits=X, axis=-1, mask=None))
    yield Door("top_k", top_k, lambda: dict(logits=X, k=2, axis=-1, mask=None))
    for loss in (entropy, entropy_loss, expert_load, importance_loss, load_balance_loss):
        yield Door(loss.__name__, loss, lambda: {"coefficients": X / 8})
    yield Door("z_loss", z_loss, lambda: {"logits": X})
    given: dict[str, Any] = dict(bias=X[0], coefficients=X / 8, speed=0.01)
    yield Door("balanced_bias", balanced_bias, lambda: given)


def _editing() -> Iterator[Door]:
    def layer() -> dict[str, Any]:
        gate = {"gate.projection_0": np.zeros((8, 3), "float32")}
        named = {f"factors.{name}": array for name, array in factors().items()}
        return {"config": config(), "arrays": {**named, **gate}, "level": 0}

    own: dict[str, dict[str, Any]] = {
        "scale_experts": {"factors": {0: 0.5}},
        "silence_experts": {"indices": [0]},
        "replace_expert": {"index": 0, "weight": np.ones((8, 4)), "bias": None, "source": None},
        "merge_experts": {"indices": [0, 2], "weights": [1.0, 2.0]},
        "permute_experts": {"order": [2, 0, 1], "gate": True},
    }
    for name, given in own.items():
        yield Door(
            f"editing.{name}", getattr(editing, name), partial(lambda g: {**layer(), **g}, given)
        )
    steered: dict[str, Any] = {"coefficients": X / 8, "experts": None}
    coefficients: dict[str, dict[str, Any]] = {
        "steer_experts": {**steered, "additions": {0: 0.5}},
        "subgroup_coefficients": {**steered, "members": [True, False, True]},
        "threshold_experts": {**steered, "logits": X, "subgroup": X[0], "scale": 1.0, "target": 0},
        "threshold_blindly": {"logits": X, "scale": 1.0, "target": 0},
        "oversampled_indices": {"groups": [0, 0, 1], "seed": 0},
    }
    for name, given in coefficients.items():
        yield Door(f"editing.{name}", getattr(editing, name), partial(dict, given))


def _arrays() -> Iterator[Door]:
    yield Door("convert", tensormoe.convert, lambda: dict(arrays=X, library="numpy", copy=None))
    yield Door("backend_of", lambda array: tensormoe.backend_of(array), lambda: {"array": X})
    yield Door("get_backend", tensormoe.get_backend, lambda: {"name": "numpy"})
    yield Door(
        "to_tensorly", tensormoe.to_tensorly, lambda: dict(factorization=CP(2), factors=factors())
    )
    yield Door(
        "from_tensorly",
        tensormoe.from_tensorly,
        lambda: dict(
            factorization=CP(2), decomposition=tensormoe.to_tensorly(CP(2), factors()), bias=True
        ),
    )
    for name in ("TensorRing", "TensorTrain", "Tucker", "Hadamard", "Dense"):
        kind = getattr(tensormoe, name)
        yield Door(
            f"from_tensorly of {name}",
            lambda decomposition, kind=kind: tensormoe.from_tensorly(
                kind(2) if kind not in (tensormoe.Hadamard, tensormoe.Dense) else kind(),
                decomposition,
                bias=False,
            ),
            lambda: {"decomposition": None},
        )


def _decomposition() -> Iterator[Door]:
    quick = Search(starts=1, sweeps=2, polish=1)
    common: Callable[[], dict[str, Any]] = lambda: dict(  # noqa: E731
        weights=weights(), bias=None, inputs=None, coefficients=None, search=quick, seed=0
    )
    yield Door(
        "decompose",
        decompose,
        lambda: common() | dict(factorization="cp", rank=2, budget=None, tolerance=None),
    )
    yield Door(
        "decompose by budget",
        decompose,
        lambda: common() | dict(factorization="tucker", budget=0.5),
    )
    yield Door(
        "decompose by tolerance",
        decompose,
        lambda: common() | dict(factorization="cp", tolerance=0.5),
    )
    yield Door(
        "error_curves", error_curves, lambda: common() | dict(factorizations=["cp"], budgets=[0.5])
    )
    yield Door("Search", Search, lambda: dict(starts=1, sweeps=2, polish=1, tolerance=1e-3))
    yield Door(
        "Compression",
        Compression,
        lambda: dict(
            factorization="cp", rank=2, budget=None, tolerance=None, experts=("a.*.b",), seed=0
        ),
    )
    settings = Compression("cp", rank=2, preset="mixtral")
    yield Door(
        "plan_compression", plan_compression, lambda: dict(model="nowhere", settings=settings)
    )
    yield Door(
        "compress_checkpoint",
        compress_checkpoint,
        lambda: dict(
            model="nowhere",
            output="out",
            settings=settings,
            max_memory=None,
            callback=None,
            client=None,
        ),
    )


def _files() -> Iterator[Door]:
    def saved(**given: Any) -> Any:
        save_checkpoint("a.safetensors", "MuMoE", {}, {"x": X})
        return read_checkpoint(**given)

    yield Door(
        "save_checkpoint",
        save_checkpoint,
        lambda: dict(path="b.safetensors", block="MuMoE", config={}, arrays={"x": X}),
    )
    yield Door("read_checkpoint", saved, lambda: dict(path="a.safetensors", backend=BACKEND))
    yield Door("peek_checkpoint", peek_checkpoint, lambda: {"path": "a.safetensors"})
    yield Door(
        "match_arrays",
        match_arrays,
        lambda: dict(expected={"x": (3, 8)}, arrays={"x": X}, strict=True),
    )
    yield Door(
        "check_arrays",
        check_arrays,
        lambda: dict(config=config(), arrays={}, backend=BACKEND, dtypes=("float32",)),
    )
