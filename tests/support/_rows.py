"""Which backend has which feature, with the probe that shows it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests._everywhere import FRAMEWORKS
from tests.support import _features, _native
from tests.support._features import BLOCK, GATED, LAYER, TABLE, check_as_numpy, check_half
from tests.support._layers import COLUMNS, FACTORIZATION_TABLE, GATE_TABLE, running
from tests.support._table import Missing, Row, Table

EAGER = Missing(
    "NumPy and CuPy run operation by operation and differentiate nothing by themselves: gradients "
    "come from closed forms, once."
)
HALF = Missing("NumPy and CuPy have no bfloat16.")
PARTS = Missing("Call the layer on parts of the batch; outside training the result is the same.")
CONSTANT = Missing(
    "PyTorch and JAX layers have no prepared form: they do work on weights alone in each call."
)
CASTS = Missing("PyTorch's autocast; elsewhere the caller casts arrays.")
FUNCTIONS = Missing("A function has no methods; `LayerSpec.cost` of the core says what it costs.")
TORCH_ONLY = Missing("In PyTorch alone. The other frameworks open the checkpoint of the result.")
PURE = Missing("A layer is a configuration and a dictionary of arrays, which Python copies.")
MODULES = Missing("Flax copies by `nnx.split` and `nnx.merge`; Equinox's modules never change.")

Check = Callable[..., None]


def row(name: str, check: Check, *values: Any, without: dict[str, Missing] | None = None) -> Row:
    """A feature with its check, and those that lack it."""
    lacking = without or {}
    return Row(
        name,
        tuple(
            lacking.get(each.name) or partial(running, check, each, *values) for each in FRAMEWORKS
        ),
    )


def lacking(*parts: tuple[Missing, tuple[str, ...]]) -> dict[str, Missing]:
    return {name: reason for reason, names in parts for name in names}


NUMPYS, JAXES = ("NumPy", "CuPy"), ("JAX", "Flax NNX", "Equinox")
AUTOMATIC = lacking((EAGER, NUMPYS))
IN_PYTORCH = lacking((TORCH_ONLY, (*NUMPYS, *JAXES)))
COMPILED = ("PyTorch", *JAXES)

FEATURE_TABLE = Table(
    "Features",
    "Outputs and gradients are NumPy's, and in float64 gradients are finite differences as well; "
    "what else a feature must do is in the tests (`tests/support`).",
    "feature",
    COLUMNS,
    (
        row("layer (`MuMoE`)", check_as_numpy, LAYER, "gate", "float64"),
        row("block of two layers (`MuMoEMLP`)", check_as_numpy, BLOCK, "gate", "float64"),
        row("gated block, as SwiGLU (`gated=True`)", check_as_numpy, GATED, "gate", "float64"),
        row("embedding (`MuMoEEmbedding`)", check_as_numpy, TABLE, "dense", "float64"),
        row("one, two and three levels of experts", _features.check_levels),
        row("ready-made coefficients, with gradients", check_as_numpy, BLOCK, "dense", "float64"),
        row("coefficients by index (`TopK`)", check_as_numpy, LAYER, "indexed", "float64"),
        row("float64, to 1e-12", check_as_numpy, LAYER, "gate", "float64"),
        row("float32, to 1e-5", check_as_numpy, LAYER, "gate", "float32"),
        row("float16", check_half, "float16"),
        row("bfloat16", check_half, "bfloat16", without=lacking((HALF, NUMPYS))),
        row(
            "mixed precision (autocast)",
            _native.check_autocast,
            without=lacking((CASTS, (*NUMPYS, *JAXES))),
        ),
        row("checkpoints, the same bytes", _features.check_checkpoints),
        row("arrays to and from other libraries (`convert`)", _features.check_exchange),
        row("training", _native.check_training),
        row("dropout in blocks", _native.check_dropout),
        row("second derivatives", _native.check_second, without=AUTOMATIC),
        row("compilation as one graph", _native.check_compile, without=AUTOMATIC),
        row("export, batch size open", _native.check_export, without=AUTOMATIC),
        row("vmap", _native.check_vmap, without=AUTOMATIC),
        row(
            "batches in chunks (`memory_limit`)",
            _native.check_memory_limit,
            without=lacking((PARTS, COMPILED)),
        ),
        row(
            "prepared weights (`prepare`)",
            _native.check_prepare,
            without=lacking((CONSTANT, COMPILED)),
        ),
        row("one expert, or all (`expert`, `materialize`)", _features.check_weights),
        row("the same for a whole block", _features.check_block_weights),
        row(
            "cost of a call (`cost`)", _features.check_cost, without=lacking((FUNCTIONS, ("JAX",)))
        ),
        row(
            "deepcopy and pickle",
            _features.check_copies,
            without=lacking((PURE, ("JAX",)), (MODULES, ("Flax NNX", "Equinox"))),
        ),
        row("surgery on models (`replace`)", _native.check_surgery, without=IN_PYTORCH),
        row("experts edited as arrays (`tensormoe.editing`)", _native.check_editing_of_arrays),
        row("the same in place, and taken back", _native.check_editing, without=IN_PYTORCH),
        row("released code's weights", _native.check_official, without=IN_PYTORCH),
    ),
)

HEAD = """\
# What works where

A layer is the same in every framework. A checkpoint written by one opens in each other one, with
equal outputs and gradients: to 1e-5 in float32 and 1e-12 in float64, relative to the largest entry
of an array or to 1. That is tested with random factorizations, levels, gates, biases, blocks and
embeddings.

Each tick is a test of just that combination, and this page is written from those tests. A dash
means that something is not there; its note says why, or what takes its place. Gates and
factorizations do not depend on one another, so that each gate goes with each factorization.

CuPy's layers are tested on a stand-in where there is no GPU: NumPy behind exactly the functions of
the installed CuPy. Runs on devices are in [GPUs](gpu.md).
"""

TABLES = (FACTORIZATION_TABLE, GATE_TABLE, FEATURE_TABLE)
