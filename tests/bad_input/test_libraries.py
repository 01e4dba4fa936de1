"""Libraries that are unknown, mixed or missing, and what errors are to callers."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import array_api_strict as strict
import numpy as np
import pytest

import tensormoe
from tensormoe import CP, backend_of, get_backend, to_tensorly
from tensormoe.backend import loaded_backend
from tensormoe.errors import BackendError, MissingDependencyError, TensormoeError
from tests.bad_input._cases import Case, assert_refused


def without(*names: str) -> Callable[[pytest.MonkeyPatch], None]:
    """An environment in which some libraries are not installed."""

    def prepare(patch: pytest.MonkeyPatch) -> None:
        real = importlib.util.find_spec

        def find(name: str, package: str | None = None) -> Any:
            return None if name in names else real(name, package)

        patch.setattr("tensormoe.backend._registry.find_spec", find)
        loaded_backend.cache_clear()

    return prepare


CASES: dict[str, Case] = {
    "unknown backend": (
        lambda: get_backend("mlx"),
        BackendError,
        "backend must be one of .*numpy.*; got 'mlx'. Another library joins through an entry point",
    ),
    "mixed libraries": (
        lambda: backend_of(np.ones(2), strict.ones(2)),
        BackendError,
        r"one library; got numpy\.ndarray at 0, array_api_strict\.Array at 1. Convert them",
    ),
    "no factors": (lambda: to_tensorly(CP(2), {}), BackendError, "one library; got no arrays"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str) -> None:
    assert_refused(*CASES[name])


# an Alternative is a part of one
@pytest.mark.parametrize("error", sorted({*tensormoe.errors.__all__} - {"Alternative"}))
def test_errors_are_what_callers_would_catch_anyway(error: str) -> None:
    kind = getattr(tensormoe.errors, error)
    assert issubclass(kind, TensormoeError)
    builtin = {
        "BackendError": TypeError,
        "ClusterError": RuntimeError,
        "LayoutError": NotImplementedError,
        "MissingDependencyError": ImportError,
        "TrainingError": RuntimeError,
    }
    if kind is not TensormoeError:
        assert issubclass(kind, builtin.get(error, ValueError))


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without("numpy")(monkeypatch)
    try:
        with pytest.raises(MissingDependencyError, match=r"needs numpy.*'tensormoe\[numpy\]'"):
            get_backend("numpy")
    finally:
        loaded_backend.cache_clear()


@pytest.mark.parametrize(
    ("package", "library", "extra"),
    [
        ("tensormoe_numpy", "numpy", "numpy"),
        ("tensormoe_numpy", "scipy", "numpy"),
        ("tensormoe_torch", "torch", "torch"),
        ("tensormoe_jax", "jax", "jax"),
        ("tensormoe_jax.nnx", "flax", "flax"),
        ("tensormoe_jax.equinox", "equinox", "equinox"),
        ("tensormoe_cupy", "cupy", "cupy"),
        ("tensormoe.testing", "hypothesis", "testing"),
        ("tensormoe.testing", "tensorly", "testing"),
        ("tensormoe.testing", "pytest", "testing"),
    ],
)
def test_packages_without_their_library(package: str, library: str, extra: str) -> None:
    code = f"""
import sys
sys.modules[{library!r}] = None
try:
    import {package}
except ImportError as error:
    print(type(error).__name__, error)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{root}:{root / 'backends'}", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (
        f"MissingDependencyError {package} needs {library}, which is not installed. "
        f"Install it with: pip install 'tensormoe[{extra}]'.\n"
    )
