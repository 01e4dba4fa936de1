"""Edits as functions of arrays: the same on every library, and nothing changes in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tensormoe import CP, BaseDelta, LayerSpec
from tensormoe.editing import (
    merge_experts,
    permute_experts,
    replace_expert,
    scale_experts,
    silence_experts,
)
from tensormoe.errors import BackendError, ShapeError, SpecError
from tensormoe.functional import BlockConfig, LayerConfig
from tests._kinds import KINDS
from tests._python import run_python

Arrays = dict[str, Any]

TARGET = np.random.default_rng(9).standard_normal((3, 6, 5)).astype("float32")
BIAS = np.random.default_rng(8).standard_normal((3, 5)).astype("float32")

EDITS: dict[str, Callable[[Any, Arrays, Callable[[Any], Any]], Any]] = {
    "scale": lambda config, arrays, put: (scale_experts(config, arrays, {2: 0.3, 0: -2}), 0.0),
    "silence": lambda config, arrays, put: (silence_experts(config, arrays, [1, 3, 1]), 0.0),
    "copy": lambda config, arrays, put: replace_expert(config, arrays, 3, source=1),
    "level": lambda config, arrays, put: replace_expert(config, arrays, 1, source=2, level=1),
    "merge": lambda config, arrays, put: merge_experts(config, arrays, [3, 0, 1], [1, 0, 2.5]),
    "merge level": lambda config, arrays, put: merge_experts(config, arrays, (0, 2), level=1),
    "permute": lambda config, arrays, put: (
        permute_experts(config, arrays, [2, 0, 3, 1], gate=False),
        0.0,
    ),
    "permute level": lambda config, arrays, put: (
        permute_experts(config, arrays, (1, 2, 0), 1, gate=False),
        0.0,
    ),
    "fit": lambda config, arrays, put: replace_expert(
        config, arrays, 2, put(TARGET), put(BIAS), level=0
    ),
    "fit without biases": lambda config, arrays, put: replace_expert(
        config, arrays, 0, put(TARGET)
    ),
}


def config_of(kind: Any) -> LayerConfig:
    return LayerConfig(LayerSpec(6, 5, (4, 3), kind), None)


def values_of(config: LayerConfig | BlockConfig, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        name: rng.standard_normal(shape).astype(dtype)
        for name, shape in config.parameter_shapes().items()
    }


def in_place(config: LayerConfig, values: dict[str, np.ndarray], edit: str) -> Any:
    """The same edit of PyTorch's layer, and the error it reports."""
    import tensormoe_torch as package

    arrays = {name: torch.tensor(array) for name, array in values.items()}
    layer = package.MuMoE.restore(config, arrays)
    error = {
        "scale": lambda: package.scale_experts(layer, {2: 0.3, 0: -2}),
        "silence": lambda: package.silence_experts(layer, [1, 3, 1]),
        "copy": lambda: package.replace_expert(layer, 3, source=1),
        "level": lambda: package.replace_expert(layer, 1, source=2, level=1),
        "merge": lambda: package.merge_experts(layer, [3, 0, 1], [1, 0, 2.5]),
        "merge level": lambda: package.merge_experts(layer, (0, 2), level=1),
        "permute": lambda: package.permute_experts(layer, [2, 0, 3, 1], gate=False),
        "permute level": lambda: package.permute_experts(layer, (1, 2, 0), 1, gate=False),
        "fit": lambda: package.replace_expert(layer, 2, torch.tensor(TARGET), torch.tensor(BIAS)),
        "fit without biases": lambda: package.replace_expert(layer, 0, torch.tensor(TARGET)),
    }[edit]()
    found = {f"factors.{name}": each.detach().numpy() for name, each in layer.factors.items()}
    return found, error or 0.0


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_library_edits_as_layers_of_pytorch_do(
    kind: Any, edit: str, libraries: dict[str, Any]
) -> None:
    config = config_of(kind)
    values = values_of(config)
    if "delta" in kind.name and edit in ("scale", "silence"):
        with pytest.raises(SpecError, match=r"have a part in common.*replace_expert"):
            EDITS[edit](config, values, np.array)
        return
    wanted, error = in_place(config, values, edit)
    changed = {name for name in values if not np.array_equal(wanted[name], values[name])}
    assert changed
    for library, (put, get) in libraries.items():
        arrays = {name: put(array) for name, array in values.items()}
        found, off = EDITS[edit](config, arrays, put)
        assert off == error, library
        assert [*found] == [*values]
        for name, array in found.items():
            assert type(array) is type(arrays[name])
            assert (array is arrays[name]) == (name not in changed), (library, name)
            np.testing.assert_array_equal(get(array), wanted[name], err_msg=library)
            np.testing.assert_array_equal(get(arrays[name]), values[name], err_msg=library)


def test_blocks_are_edited_in_both_layers() -> None:
    layers = LayerSpec(4, 6, 3, CP(2)), LayerSpec(6, 5, 3, CP(3))
    config = BlockConfig(LayerConfig(layers[0], None), LayerConfig(layers[1], None), "relu")
    values = values_of(config)
    found = scale_experts(config, values, {1: 2.0})
    for name, array in values.items():
        scales = np.array([[1.0], [2.0], [1.0]]) if name.endswith("expert_0") else np.ones(())
        assert np.array_equal(found[name], array * scales), name
    copied, error = replace_expert(config, values, 2, source=0)
    assert error == 0.0
    for name in ("first.factors.expert_0", "second.factors.expert_0"):
        assert np.array_equal(copied[name], values[name][[0, 1, 0]])
    with pytest.raises(SpecError, match=r"a block has two layers.*config.first"):
        replace_expert(config, values, 0, np.ones((4, 6), "float32"))


def test_zero_is_zero_whatever_there_was() -> None:
    config = LayerConfig(LayerSpec(4, 3, 3, CP(2)), None)
    values = values_of(config)
    values["factors.expert_0"][1] = [np.inf, np.nan]
    assert replace_expert(config, values, 0, np.ones((4, 3), "float32"))[1] < 1.0
    for found in (silence_experts(config, values, 1), scale_experts(config, values, {1: 0})):
        assert not found["factors.expert_0"][1].any()
    values["factors.input"][0] = np.nan
    with pytest.raises(ShapeError, match="factors and the fitted ones must be finite"):
        replace_expert(config, values, 0, np.ones((4, 3), "float32"))


def test_half_precision_is_multiplied_in_float32() -> None:
    config = LayerConfig(LayerSpec(4, 3, 3, CP(2)), None)
    values = {name: jnp.asarray(a, jnp.bfloat16) for name, a in values_of(config).items()}
    found = scale_experts(config, values, {0: 0.3})["factors.expert_0"]
    wide = values["factors.expert_0"].astype(jnp.float32)[0] * jnp.float32(0.3)
    assert found.dtype == jnp.bfloat16
    assert (found[0] == wide.astype(jnp.bfloat16)).all()


def test_edits_are_traced_and_differentiated() -> None:
    """All but fits, whose work is on the host."""
    config = LayerConfig(LayerSpec(4, 3, 3, CP(2)), None)
    values = {name: jnp.asarray(array) for name, array in values_of(config).items()}

    @jax.jit
    def total(arrays: Arrays) -> Any:
        changed = scale_experts(config, arrays, {0: 3.0, 2: 0.0})
        copied, _ = replace_expert(config, changed, 1, source=0)
        return sum(array.sum() for array in copied.values())

    gradients = jax.grad(total)(values)
    assert gradients["factors.expert_0"].tolist() == [[6.0] * 2, [0.0] * 2, [0.0] * 2]
    with pytest.raises(BackendError, match="traced"):
        jax.jit(lambda arrays: replace_expert(config, arrays, 0, jnp.ones((4, 3)))[0])(values)


CONFIG = config_of(CP(2))
VALUES = values_of(CONFIG)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: scale_experts(CONFIG.spec, VALUES, {}), SpecError, "config must be"),  # type: ignore[arg-type]
    (lambda: scale_experts(CONFIG, [1], {}), SpecError, "arrays must be a mapping"),  # type: ignore[arg-type]
    (lambda: scale_experts(CONFIG, {}, {}), ShapeError, r"hold 'factors.expert_0' of shape \(4, 2"),
    (lambda: scale_experts(CONFIG, VALUES, {4: 1.0}), ShapeError, r"in \[0, 4\) at level 0; got 4"),
    (lambda: silence_experts(CONFIG, VALUES, 3, 1), ShapeError, r"in \[0, 3\) at level 1; got 3"),
    (lambda: silence_experts(CONFIG, VALUES, 0, 2), ShapeError, r"level must lie in \[0, 2\)"),
    (lambda: scale_experts(CONFIG, VALUES, {0: np.inf}), SpecError, "finite number; got inf"),
    (lambda: scale_experts(CONFIG, VALUES, [1.0]), TypeError, "must map experts' indices"),  # type: ignore[arg-type]
    (lambda: replace_expert(CONFIG, VALUES, 0), SpecError, "weight absent, bias absent"),
    (lambda: replace_expert(CONFIG, VALUES, 0, source=4), ShapeError, "got 4"),
    (lambda: replace_expert(CONFIG, VALUES, 0, TARGET[0]), ShapeError, r"\(3, 6, 5\); got \(6, 5"),
    (lambda: replace_expert(CONFIG, VALUES, 0, TARGET, BIAS[0]), ShapeError, r"bias must have sha"),
    (lambda: replace_expert(CONFIG, VALUES, 0, np.log(-abs(TARGET))), ShapeError, "nan at "),
    (
        lambda: replace_expert(CONFIG, VALUES, 0, jnp.asarray(TARGET)),
        BackendError,
        "array of numpy",
    ),
    (
        lambda: scale_experts(CONFIG, {**VALUES, "factors.output": np.ones((2, 2))}, {}),
        ShapeError,
        r"factors.output must have shape \(5, 2\); got \(2, 2\)",
    ),
    (
        lambda: scale_experts(CONFIG, {**VALUES, "factors.output": jnp.ones((5, 2))}, {}),
        BackendError,
        "jax",
    ),
    (
        lambda: scale_experts(CONFIG, {**VALUES, "factors.output": None}, {}),
        BackendError,
        "NoneType",
    ),
]


@pytest.mark.parametrize(("edit", "error", "message"), BAD)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_cannot_be_is_refused(
    edit: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        edit()


SCRIPT = """
import sys
sys.modules["numpy"] = None
import warnings
warnings.simplefilter("ignore")
import torch
from tensormoe.errors import MissingDependencyError
from tensormoe_torch import MuMoE, replace_expert, silence_experts
layer = MuMoE(4, 3, experts=3, rank=2)
silence_experts(layer, 0)
replace_expert(layer, 1, source=0)
try:
    replace_expert(layer, 1, torch.ones(4, 3))
except MissingDependencyError as error:
    print(error)
"""


def test_only_fits_need_numpy() -> None:
    done = run_python("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "fitting an expert needs numpy, which is not installed" in done.stdout


def test_a_common_part_is_named() -> None:
    config = config_of(BaseDelta(2))
    with pytest.raises(SpecError, match="experts of base_delta have a part in common"):
        silence_experts(config, values_of(config), 0)
