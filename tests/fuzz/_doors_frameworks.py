"""Public functions of layers in every framework, and of tools for PyTorch models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import tensormoe_jax
import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_numpy
import tensormoe_torch
from tensormoe import CP, Gate, LayerSpec
from tensormoe.decomposition import Search
from tensormoe.functional import LayerConfig
from tests.fuzz._doors import Door

Given = dict[str, Any]
SIZES: Given = dict(in_features=8, out_features=4, experts=3, factorization="cp", rank=2)
TABLE: Given = dict(num_embeddings=8, embedding_dim=4, experts=3, factorization="cp", rank=2)
BLOCK: Given = dict(
    in_features=8,
    hidden_features=6,
    out_features=4,
    act_layer="gelu",
    bias=True,
    drop=0.0,
    experts=3,
    factorization="cp",
    rank=2,
)
OPTIONS: Given = dict(budget=None, bias=True, gate="entmax", init="variance")


def doors() -> Iterator[Door]:
    yield from _numpy()
    yield from _torch()
    yield from _torch_models()
    yield from _jax()
    yield from _modules("nnx", tensormoe_jax.nnx, "rngs", nnx.Rngs(0))
    yield from _modules("equinox", tensormoe_jax.equinox, "key", jax.random.key(0))


def _constructors(library: str, package: Any, extra: Callable[[], Given]) -> Iterator[Door]:
    yield Door(f"{library} MuMoE", package.MuMoE, lambda: {**SIZES, **OPTIONS, **extra()})
    yield Door(
        f"{library} MuMoE by budget",
        package.MuMoE,
        lambda: {**SIZES, "rank": None, "budget": "linear", **extra()},
    )
    yield Door(
        f"{library} MuMoEMLP",
        package.MuMoEMLP,
        lambda: {**BLOCK, **OPTIONS, "gated": False, **extra()},
    )
    yield Door(
        f"{library} MuMoEEmbedding",
        package.MuMoEEmbedding,
        lambda: {**TABLE, "budget": None, "init": "variance", **extra()},
    )
    for name in ("MuMoE", "MuMoEMLP", "MuMoEEmbedding"):
        kind = getattr(package, name)
        yield Door(f"{library} {name}.load", kind.load, lambda: {"path": "nowhere"})
        yield Door(f"{library} {name}.restore", kind.restore, lambda: dict(config=None, arrays={}))


def _methods(
    library: str, package: Any, extra: Callable[[], Given], x: Callable[[], Any], ids: Any
) -> Iterator[Door]:
    def layer() -> Any:
        return package.MuMoE(**SIZES, **extra())

    def block() -> Any:
        return package.MuMoEMLP(**BLOCK, **extra())

    def table() -> Any:
        return package.MuMoEEmbedding(**TABLE, **extra())

    for name, make in (("MuMoE", layer), ("MuMoEMLP", block)):
        yield Door(
            f"{library} {name}()",
            lambda x, coefficients, make=make: make()(x, coefficients),
            lambda: dict(x=x(), coefficients=None),
        )
        yield Door(
            f"{library} {name}.coefficients",
            lambda x, make=make: make().coefficients(x),
            lambda: {"x": x()},
        )
        yield Door(
            f"{library} {name}.cost",
            lambda make=make, **given: make().cost(**given),
            lambda: dict(batch=4, training=False),
        )
        yield Door(
            f"{library} {name}.save",
            lambda path, make=make: make().save(path),
            lambda: {"path": "a.safetensors"},
        )
        yield Door(
            f"{library} {name}.expert",
            lambda index, make=make: make().expert(index),
            lambda: {"index": 1},
        )
        yield Door(
            f"{library} {name}.plan",
            lambda batch, make=make: make().plan(batch),
            lambda: {"batch": 4},
        )
    yield Door(
        f"{library} MuMoEEmbedding()",
        lambda ids, coefficients: table()(ids, coefficients),
        lambda: dict(ids=ids(), coefficients=x()[:, :3]),
    )


def _numpy() -> Iterator[Door]:
    package = tensormoe_numpy

    def extra() -> Given:
        return dict(dtype="float32", seed=0)

    def x() -> np.ndarray:
        return np.ones((3, 8), "float32")

    yield from _constructors("numpy", package, extra)
    yield from _methods("numpy", package, extra, x, lambda: np.array([0, 1, 2]))

    def layer() -> Any:
        return package.MuMoE(**SIZES, seed=0)

    yield Door(
        "numpy vjp",
        lambda **given: layer().vjp(**given),
        lambda: dict(x=x(), coefficients=None, training=True),
    )
    yield Door(
        "numpy pullback",
        lambda cotangent: layer().vjp(x())[1](cotangent),
        lambda: {"cotangent": np.ones((3, 4), "float32")},
    )
    yield Door("numpy prepared", lambda x: layer().prepare()(x), lambda: {"x": x()})
    yield Door(
        "Adam",
        package.Adam,
        lambda: dict(
            parameters={"a": x()},
            lr=1e-3,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.0,
            rules=None,
        ),
    )
    yield Door(
        "Adam.step",
        lambda gradients: package.Adam({"a": x()}).step(gradients),
        lambda: {"gradients": {"a": x()}},
    )


def _torch() -> Iterator[Door]:
    package = tensormoe_torch

    def extra() -> Given:
        return dict(device=None, dtype=torch.float32)

    yield from _constructors("torch", package, extra)
    yield from _methods(
        "torch", package, extra, lambda: torch.ones(3, 8), lambda: torch.tensor([0, 1, 2])
    )

    def layer() -> Any:
        return package.MuMoE(**SIZES)

    yield Door(
        "scale_experts",
        package.scale_experts,
        lambda: dict(layer=layer(), factors={0: 0.5}, level=0),
    )
    yield Door(
        "silence_experts",
        package.silence_experts,
        lambda: dict(layer=layer(), indices=[0], level=0),
    )
    yield Door(
        "replace_expert",
        package.replace_expert,
        lambda: dict(
            layer=layer(),
            index=0,
            weight=torch.ones(8, 4),
            bias=torch.ones(4),
            source=None,
            level=0,
        ),
    )
    yield Door(
        "merge_experts",
        package.merge_experts,
        lambda: dict(layer=layer(), indices=[0, 2], weights=[1.0, 2.0], level=0),
    )
    yield Door(
        "permute_experts",
        package.permute_experts,
        lambda: dict(layer=layer(), order=[2, 0, 1], level=0, gate=True),
    )
    yield Door(
        "steered",
        package.steered,
        lambda: dict(layers=layer(), additions={0: 0.5}, level=0),
    )
    yield Door(
        "parameter_groups",
        package.parameter_groups,
        lambda: dict(model=layer(), weight_decay=0.1, lr=0.01, gate_lr=0.01),
    )
    yield Door(
        "ExpertGate",
        package.ExpertGate,
        lambda: dict(
            config=LayerConfig(LayerSpec(8, 4, 3, CP(2)), Gate()), device=None, dtype=None
        ),
    )


def _torch_models() -> Iterator[Door]:
    package, nn = tensormoe_torch, torch.nn

    def mlp() -> Any:
        return nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4))

    common: Given = dict(experts=3, factorization="cp", rank=2, budget=None, gate="entmax")
    yield Door("from_linear", package.from_linear, lambda: dict(linear=nn.Linear(8, 4), **common))
    yield Door("from_mlp", package.from_mlp, lambda: dict(mlp=mlp(), **common))
    yield Door("replace", package.replace, lambda: dict(model=mlp(), select="0", **common))
    yield Door(
        "from_official",
        package.from_official,
        lambda: dict(state={}, prefix="", factorization=None, activation="entmax"),
    )
    yield Door("to_official", package.to_official, lambda: dict(layer=None, prefix="", batches=0))

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w3, self.w2 = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))
            return found

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Expert() for _ in range(3))

        def forward(self, x: torch.Tensor) -> Any:
            return sum(expert(x) for expert in self.experts)

    def sparse() -> Any:
        return Sparse()

    yield Door(
        "compress",
        package.compress,
        lambda: dict(
            model=sparse(),
            factorization="cp",
            rank=2,
            budget=None,
            tolerance=None,
            select=None,
            # inputs are the model's own, which says by itself what it cannot take
            weighted=False,
            search=Search(starts=1, sweeps=2, polish=1),
            seed=0,
        ),
    )


def _jax() -> Iterator[Door]:
    config = LayerConfig(LayerSpec(8, 4, 3, CP(2)), Gate())
    parameters = tensormoe_jax.initialize(config, jax.random.key(0))
    x = jnp.ones((3, 8))
    yield Door(
        "jax initialize",
        tensormoe_jax.initialize,
        lambda: dict(config=config, key=jax.random.key(0), init="variance", dtype=jnp.float32),
    )
    called: Given = dict(config=config, parameters=parameters, x=x)
    yield Door(
        "jax apply", tensormoe_jax.apply, lambda: {**called, "coefficients": None, "buffers": None}
    )
    yield Door(
        "jax train",
        tensormoe_jax.train,
        lambda: {**called, "coefficients": None, "buffers": None, "key": None},
    )
    yield Door(
        "jax coefficients",
        tensormoe_jax.coefficients,
        lambda: {**called, "buffers": None, "training": False, "axis_name": None},
    )
    yield Door(
        "jax initial_buffers",
        tensormoe_jax.initial_buffers,
        lambda: dict(config=config, dtype=None),
    )


def _modules(library: str, package: Any, name: str, source: Any) -> Iterator[Door]:
    def extra() -> Given:
        return {name: source, "dtype": jnp.float32}

    yield from _constructors(library, package, extra)
    yield from _methods(library, package, extra, lambda: jnp.ones((3, 8)), lambda: jnp.arange(3))
