"""Array libraries under test, the strict reference of the standard among them."""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import array_api_strict as strict
import jax.numpy as jnp
import numpy as np
import torch

from tests._cupy_standin import device, host
from tests._cupy_standin import installed as cupy_installed
from tests._third_party import code_blocks, installed, write_metadata

LIBRARIES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "numpy": (np.array, np.asarray),
    "torch": (torch.tensor, lambda array: array.detach().numpy()),
    "jax": (jnp.asarray, np.asarray),
    "cupy": (lambda array: device({"": array})[""], lambda array: host({"": array})[""]),
    "array_api_strict": (lambda array: strict.asarray(array.copy()), np.from_dlpack),
}
"""From NumPy's arrays and back, by name."""


@contextmanager
def every_library() -> Iterator[dict[str, Any]]:
    """All libraries, with an adapter for the strict one and a stand-in for CuPy."""
    page = "docs/adding-a-backend.md"
    with tempfile.TemporaryDirectory() as folder:
        (project,) = code_blocks(page, "toml")
        Path(folder, "tensormoe_strict.py").write_text(code_blocks(page, "python")[0])
        write_metadata(Path(folder), tomllib.loads(project)["project"])
        with cupy_installed(), installed(Path(folder)):
            yield LIBRARIES
