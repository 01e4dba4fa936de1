"""The chosen layer as code for each framework, to copy and run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tensormoe._config import BlockConfig, LayerConfig
from tensormoe.factorizations import FACTORIZATIONS, Factorization
from tensormoe.gates import Gate


@dataclass(frozen=True)
class _Framework:
    """Words of one framework for the same layer.

    Args:
        imports: besides tensormoe's.
        module: that has the layers.
        extra: the argument that constructors take besides.
        dtype: of an array, with the name of the dtype in it; empty for frameworks that are told
            by name.
        normal: an array of normal numbers of a shape and dtype.
        ids: integers below a size, of a shape.
        even: coefficients that are all alike, of a shape and dtype.
    """

    imports: tuple[str, ...]
    module: str
    extra: str
    dtype: str
    normal: str
    ids: str
    even: str


_JAX = {
    "dtype": "jnp.{0}",
    "normal": "jax.random.normal(jax.random.key(1), {0}, dtype={1})",
    "ids": "jax.random.randint(jax.random.key(1), {0}, 0, {1})",
    "even": "jnp.full({0}, {1}, dtype={2})",
}
FRAMEWORKS: Mapping[str, _Framework] = {
    "pytorch": _Framework(
        ("import torch",),
        "tensormoe_torch",
        "",
        "torch.{0}",
        "torch.randn({0}, dtype={1})",
        "torch.randint({1}, {0})",
        "torch.full({0}, {1}, dtype={2})",
    ),
    "nnx": _Framework(
        ("import jax", "import jax.numpy as jnp", "from flax import nnx"),
        "tensormoe_jax.nnx",
        "rngs=nnx.Rngs(0)",
        **_JAX,
    ),
    "equinox": _Framework(
        ("import jax", "import jax.numpy as jnp"),
        "tensormoe_jax.equinox",
        "key=jax.random.key(0)",
        **_JAX,
    ),
    "numpy": _Framework(
        ("import numpy as np",),
        "tensormoe_numpy",
        "seed=0",
        '"{0}"',
        "np.random.default_rng(1).standard_normal({0}).astype({1})",
        "np.random.default_rng(1).integers({1}, size={0})",
        "np.full({0}, {1}, dtype={2})",
    ),
}
_NUMPY_DTYPES = ("float16", "float32", "float64")


def code(config: LayerConfig | BlockConfig, batch: int, dtype: str) -> dict[str, str]:
    """Code that makes the layer and calls it once, by framework.

    NumPy has no bfloat16, and JAX no float64 unless it is switched on: what is not there is left
    out.
    """
    names = [name for name in FRAMEWORKS if name != "numpy" or dtype in _NUMPY_DTYPES]
    return {name: _Written(config, batch, dtype, FRAMEWORKS[name]).text() for name in names}


@dataclass(frozen=True)
class _Written:
    """One layer for one framework."""

    config: LayerConfig | BlockConfig
    batch: int
    dtype: str
    framework: _Framework

    @property
    def first(self) -> LayerConfig:
        """The layer that has the gate."""
        return self.config.first if isinstance(self.config, BlockConfig) else self.config

    @property
    def factorizations(self) -> tuple[Factorization, ...]:
        if isinstance(self.config, BlockConfig):
            both = self.config.first.spec.factorization, self.config.second.spec.factorization
            return both if both[0] != both[1] else both[:1]
        return (self.config.spec.factorization,)

    @property
    def layer(self) -> str:
        """The name of the class."""
        if isinstance(self.config, BlockConfig):
            return "MuMoEMLP"
        return "MuMoEEmbedding" if self.config.indexed_input else "MuMoE"

    def text(self) -> str:
        """The code."""
        gate = self._gate()
        ours = [*{type(each).__name__ for each in self.factorizations if _is_ours(each)}]
        ours += ["Gate"] if gate.startswith("Gate(") else []
        lines = [*self.framework.imports]
        if self.dtype == "float64" and "import jax" in lines:
            lines.append('\njax.config.update("jax_enable_x64", True)')
        lines += ["", f"from tensormoe import {', '.join(sorted(ours))}"] if ours else [""]
        for each in self.factorizations:
            if not _is_ours(each):
                lines.append(f"from {type(each).__module__} import {type(each).__name__}")
        lines += [f"from {self.framework.module} import {self.layer}", ""]
        lines += [
            f"layer = {self.layer}(",
            *(f"    {each}," for each in self._arguments(gate)),
            ")",
        ]
        return "\n".join([*lines, *self._call(), ""])

    def _arguments(self, gate: str) -> list[str]:
        config, framework = self.config, self.framework
        spec = self.first.spec
        kinds = ", ".join(map(repr, self.factorizations))
        if isinstance(config, BlockConfig):
            hidden, out = config.hidden_features, config.second.spec.out_features
            arguments = [f"{spec.in_features}, {hidden}, {out}", f'act_layer="{config.act_layer}"']
            arguments += ["gated=True"] if config.gated else []
        else:
            arguments = [f"{spec.in_features}, {spec.out_features}"]
        experts = spec.experts[0] if spec.levels == 1 else spec.experts
        arguments.append(f"experts={experts}")
        several = len(self.factorizations) > 1
        arguments.append(f"factorization=({kinds})" if several else f"factorization={kinds}")
        if not spec.bias and self.layer != "MuMoEEmbedding":
            arguments.append("bias=False")
        arguments += [f"gate={gate}"] if gate else []
        arguments += [] if self.dtype == "float32" else [f"dtype={self._dtype}"]
        return [*arguments, *([framework.extra] if framework.extra else [])]

    @property
    def _dtype(self) -> str:
        return self.framework.dtype.format(self.dtype)

    def _gate(self) -> str:
        """The argument; empty for the default, and for layers that take none."""
        gate = self.first.gate
        if self.layer == "MuMoEEmbedding" or gate == Gate():
            return ""
        if gate is None:
            return "None"
        plain = Gate(gate.activation, k=gate.k)
        differs = [
            f"{name}={value!r}"
            for name, value in gate.to_dict().items()
            if (name == "k" and value is not None) or value != getattr(plain, name)
        ]
        named = f'"{gate.activation}"'
        return f"Gate({', '.join([named, *differs])})" if differs else named

    def _call(self) -> list[str]:
        spec, framework = self.first.spec, self.framework
        rows = f"({self.batch}, {spec.in_features})"
        if self.layer == "MuMoEEmbedding":
            x = framework.ids.format(f"({self.batch},)", spec.in_features)
        else:
            x = framework.normal.format(rows, self._dtype)
        if self.first.gate is not None:
            return [f"y = layer({x})"]
        arrays = [
            framework.even.format(f"({self.batch}, {count})", f"1 / {count}", self._dtype)
            for count in spec.experts
        ]
        given = [f"coefficients = {arrays[0]}"]
        if spec.levels > 1:
            given = ["coefficients = (", *(f"    {array}," for array in arrays), ")"]
        return [f"x = {x}", *given, "y = layer(x, coefficients)"]


def _is_ours(factorization: Factorization) -> bool:
    return type(factorization).__module__.startswith("tensormoe.") and (
        type(factorization) in FACTORIZATIONS.values()
    )
