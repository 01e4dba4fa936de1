"""Shared parts of the checkpoint tests: arrays, files made by hand, and strategies."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from tensormoe_numpy import BACKEND

CONFIG = {
    "spec": {"in_features": 3, "experts": [4, 2], "rank": None, "bias": True},
    "gate": {"alpha": 1.5, "name": "entmax-μ"},
}
METADATA = {"format": "tensormoe", "version": "1", "block": "MuMoE", "config": "{}"}
posix = pytest.mark.skipif(os.name != "posix", reason="uses POSIX signals and file types")


def some_arrays() -> dict[str, np.ndarray]:
    return {
        "factors.input": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
        "factors.bias": np.arange(5, dtype=np.float16),
        "gate.running_mean_0": np.array(2.5),
        "gate.count": np.array(7, dtype=np.int64),
    }


def raw_file(
    entries: Mapping[str, Any] | str | bytes,
    data: bytes = b"",
    metadata: Mapping[str, Any] | None = METADATA,
) -> bytes:
    """A file with a header of our choosing, sound or not."""
    if isinstance(entries, Mapping):
        whole = {**({} if metadata is None else {"__metadata__": metadata}), **entries}
        entries = json.dumps(whole)
    text = entries if isinstance(entries, bytes) else entries.encode()
    return len(text).to_bytes(8, "little") + text + data


def f32(begin: int, end: int, shape: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def equal(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> bool:
    """Bits, dtypes, shapes and names; not their order."""
    return left.keys() == right.keys() and all(
        BACKEND.to_bytes(left[name]) == BACKEND.to_bytes(right[name]) for name in left
    )


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abμ."), inner, max_size=3),
    max_leaves=8,
)
