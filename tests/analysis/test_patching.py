"""Patching equals runs of the layer with one expert's contribution replaced, on every library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tensormoe import CP, Gate, LayerSpec
from tensormoe.analysis import patching
from tensormoe.backend import backend_of, get_backend
from tensormoe.decomposition._solve import from_host
from tensormoe.errors import ShapeError, SpecError
from tensormoe.functional import LayerConfig, Options, apply_experts, materialize, route
from tests._cupy_standin import device, host, installed

NUMPY = get_backend("numpy")
RNG = np.random.default_rng(0)
CONFIG = LayerConfig(LayerSpec(6, 5, (4, 3), CP(7)), Gate())
ARRAYS = {name: RNG.standard_normal(shape) for name, shape in CONFIG.parameter_shapes().items()}
X, CONTRAST, LABELS = (
    RNG.standard_normal((30, 6)),
    RNG.standard_normal((30, 6)),
    RNG.integers(0, 5, 30),
)
LIBRARIES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "numpy": (np.asarray, np.asarray),
    "torch": (torch.tensor, np.asarray),
    "jax": (lambda array: jnp.asarray(array, "float32"), np.asarray),
    "cupy": (lambda array: device({"": array})[""], lambda array: host({"": array})[""]),
}


def right(logits: Any, rows: slice) -> Any:
    """The logit of the right class less that of the next one."""
    one_hot = np.eye(5)[LABELS[rows]] - np.eye(5)[(LABELS[rows] + 1) % 5]
    backend = backend_of(logits)
    return backend.sum(logits * from_host(one_hot, logits, backend), (-1,))


def contributions(x: np.ndarray, level: int) -> np.ndarray:
    """(N, inputs, out), expert by expert of the whole tensor."""
    shares = route(CONFIG, ARRAYS, x, NUMPY).coefficients
    weight, bias = materialize(CONFIG, ARRAYS, NUMPY)
    made = np.einsum("ti,abio->abto", x, weight) + bias[:, :, None]
    made = made * np.einsum("ta,tb->abt", *shares)[..., None]
    return made.sum(axis=1 - level)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("paired", [False, True])
def test_patched_outputs_are_those_of_plain_sums(
    library: str, level: int, paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = RNG.standard_normal((5, 5))
    terms = contributions(X, level)
    whole = terms.sum(axis=0)
    np.testing.assert_allclose(
        whole, apply_experts(CONFIG, ARRAYS, X, route(CONFIG, ARRAYS, X, NUMPY).coefficients, NUMPY)
    )
    new = contributions(CONTRAST, level) if paired else terms.mean(axis=1, keepdims=True)
    wanted = right((whole - terms + new) ** 2 @ out, slice(None)) - right(
        (whole**2 @ out)[None], slice(None)
    )
    # in blocks that do not divide the inputs
    monkeypatch.setattr("tensormoe.analysis._interventions._BLOCK", 8 * 4 * 5 * 7)
    with installed():
        put, _ = LIBRARIES[library]
        arrays, x = {name: put(each) for name, each in ARRAYS.items()}, put(X)
        weight = put(out)

        def head(outputs: Any) -> Any:
            backend = backend_of(outputs)
            return backend.matmul(outputs * outputs, weight)

        found = patching(
            CONFIG,
            arrays,
            x,
            right,
            contrast=put(CONTRAST) if paired else None,
            level=level,
            head=head,
        )
    loose = {"rtol": 1e-3, "atol": 1e-2} if library == "jax" else {"rtol": 1e-9, "atol": 1e-8}
    np.testing.assert_allclose(found, wanted, **loose)


def test_an_input_patched_with_itself_changes_nothing() -> None:
    found = patching(CONFIG, ARRAYS, X, right, contrast=X)
    np.testing.assert_allclose(found, 0.0, atol=1e-9)
    assert patching(CONFIG, ARRAYS, X[:0], lambda logits, rows: logits[..., 0]).shape == (4, 0)
    given = [np.eye(4)[[0] * 30], np.eye(3)[[1] * 30]]
    found = patching(CONFIG, ARRAYS, X, right, given)
    assert (found[1:] == 0).all()
    assert (found[0] != 0).all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: patching(CONFIG, ARRAYS, X, right, level=2), ShapeError, "level must lie"),
        (lambda: patching(CONFIG, ARRAYS, X, right, contrast=X[:3]), ShapeError, "same shape"),
        (lambda: patching(CONFIG, ARRAYS, X[None], right), ShapeError, "one row per input"),
        (
            lambda: patching(CONFIG, ARRAYS, X, right, [np.ones((3, 4)), np.ones((3, 3))]),
            ShapeError,
            "those of the 30 inputs",
        ),
        (
            lambda: patching(CONFIG, ARRAYS, X, lambda logits, rows: logits),
            ShapeError,
            "one number per row",
        ),
        (
            lambda: patching(Options(6, "cp", rank=2).block(6, 8), ARRAYS, X, right),  # type: ignore[arg-type]
            SpecError,
            "the configuration of a layer",
        ),
    ],
)
def test_bad_input(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
