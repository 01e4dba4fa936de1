"""Code to copy: it runs, and makes the layer that it stands for."""

from __future__ import annotations

from typing import Any

import pytest

from tensormoe import CP, Gate, LayerSpec
from tensormoe.choosing import explore, parse_request
from tensormoe.choosing._code import FRAMEWORKS, code
from tensormoe.choosing._rows import row
from tensormoe.functional import BlockConfig, LayerConfig

LAYER: dict[str, Any] = {"in_features": 12, "out_features": 8, "experts": [2, 3], "batch": 5}
ASKED: list[dict[str, Any]] = [
    {"selected": "cp"},
    {"selected": "tensor_ring", "experts": 4, "gate": None, "bias": False},
    {"kind": "mlp", "selected": "cp", "gate": "softmax", "bias": False},
    {"kind": "gated", "selected": "tucker", "gate": "top_k"},
    {"kind": "embedding", "selected": "tensor_train"},
    {"selected": "cp", "gate": Gate("entmax", alpha=1.3).to_dict(), "dtype": "float64"},
    {"selected": "hadamard", "dtype": "bfloat16", "budget": 9000},
]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_code_runs_and_makes_the_layer(
    framework: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = parse_request({**LAYER, **asked})
    found = row(request, asked["selected"]).config
    assert found is not None
    text = explore({**LAYER, **asked})["selected"]["code"].get(framework)
    if framework == "numpy" and request.dtype == "bfloat16":
        assert text is None
        return
    if request.dtype == "float64" and framework in ("nnx", "equinox"):
        # a process's switch, which other tests must not see
        assert 'jax.config.update("jax_enable_x64", True)' in text
        text = text.replace('jax.config.update("jax_enable_x64", True)', "")
        text = text.replace("jnp.float64", "jnp.float32")
    space: dict[str, Any] = {}
    exec(compile(text, framework, "exec"), space)
    assert space["y"].shape == (5, 8)
    made = space["layer"].config
    assert made == found
    if isinstance(made, BlockConfig):
        assert made.act_layer == ("silu" if made.gated else "gelu")


def test_lines_are_short_enough_to_copy() -> None:
    for asked in ASKED:
        for text in explore({**LAYER, **asked})["selected"]["code"].values():
            assert max(map(len, text.splitlines())) <= 100


class Own(CP):
    """A factorization of somebody else."""

    name = "own"


def test_factorizations_of_others_are_imported_from_where_they_are() -> None:
    config = LayerConfig(LayerSpec(12, 8, 4, Own(rank=3)), Gate())
    text = code(config, 5, "float32")["numpy"]
    assert "from tests.choosing.test_code import Own\n" in text
    assert "from tensormoe import" not in text
    space: dict[str, Any] = {}
    exec(text, space)
    assert space["layer"].config == config
