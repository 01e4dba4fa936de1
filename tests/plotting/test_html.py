"""What notebooks show: well-formed, escaped, and the same for every framework."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from xml.etree import ElementTree

import numpy as np
import pytest

from tensormoe import CP, LayerSpec, rank_front
from tensormoe._html import facts_html, table_html, text_html
from tensormoe.decomposition import decompose

SIZES: dict[str, Any] = {"experts": (3, 2), "rank": 2}


def parsed(value: Any) -> ElementTree.Element:
    """The HTML of a value, which is also well-formed XML without anything that runs."""
    html = value if isinstance(value, str) else value._repr_html_()
    root = ElementTree.fromstring(html)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert tags <= {
        *("div", "strong", "table", "tr", "th", "td", "pre", "details", "summary"),
        *("svg", "title", "g", "path", "rect", "circle", "text"),
    }
    attributes = {name for element in root.iter() for name in element.attrib}
    assert not any(name.startswith("on") or name == "href" for name in attributes)
    return root


def words(value: Any) -> str:
    return " ".join("".join(parsed(value).itertext()).split())


def _numpy(kind: str) -> Any:
    import tensormoe_numpy

    return getattr(tensormoe_numpy, kind)(8, 6, seed=0, **SIZES)


def _torch(kind: str) -> Any:
    return getattr(pytest.importorskip("tensormoe_torch"), kind)(8, 6, **SIZES)


def _nnx(kind: str) -> Any:
    nnx = pytest.importorskip("flax.nnx")
    from tensormoe_jax import nnx as layers

    return getattr(layers, kind)(8, 6, rngs=nnx.Rngs(0), **SIZES)


def _equinox(kind: str) -> Any:
    pytest.importorskip("equinox")
    import jax

    from tensormoe_jax import equinox as layers

    return getattr(layers, kind)(8, 6, key=jax.random.key(0), **SIZES)


@pytest.mark.parametrize("kind", ["MuMoE", "MuMoEMLP", "MuMoEEmbedding"])
@pytest.mark.parametrize("make", [_numpy, _torch, _nnx, _equinox], ids=lambda each: each.__name__)
def test_layers(make: Callable[[str], Any], kind: str) -> None:
    layer = make(kind)
    before = repr(layer)
    root = parsed(layer)
    assert repr(layer) == before
    assert root.findtext("strong") == kind
    said = words(layer)
    # as it is, so that it can be copied
    assert " ".join(before.split()) in said
    assert "float32" in said
    assert f"{layer.config.num_parameters:,}" in said
    networks = [element for element in root.iter() if element.tag.endswith("}svg")]
    assert len(networks) == (2 if kind == "MuMoEMLP" else 1)


def test_a_layer_of_pytorch_stays_what_it_is() -> None:
    tensormoe_torch = pytest.importorskip("tensormoe_torch")
    layer = tensormoe_torch.MuMoE(8, 6, **SIZES)
    state = list(layer.state_dict())
    layer._repr_html_()
    assert list(layer.state_dict()) == state
    assert "_repr_html_" not in vars(layer)
    again = copy.deepcopy(layer)
    assert again._repr_html_() == layer._repr_html_()


def test_specs_plans_costs_and_ranks() -> None:
    spec = LayerSpec(8, 6, (3, 2), CP(2))
    assert "3 × 2 of 8 → 6" in words(spec)
    plan = spec.plan(32)
    for line in plan.describe().splitlines():
        assert " ".join(line.split()) in words(plan)
    cost = plan.cost("entmax")
    for step in cost.steps:
        assert step.label in words(cost)
    assert f"{cost.parameters:,} parameters" in words(cost)
    choice = rank_front("cp", 8, 6, 4)[0]
    assert repr(choice.factorization) in words(choice)


def test_reports(rng: np.random.Generator) -> None:
    made = decompose(rng.standard_normal((4, 6, 5)), "cp", rank=2)
    for value in (made.report, made):
        assert "weights off by" in words(value)
    assert "CP(rank=2)" in words(made)


def test_reports_on_models() -> None:
    tensormoe_torch = pytest.importorskip("tensormoe_torch")
    from torch import nn

    model = nn.Module()
    model.add_module("<b>", nn.Linear(8, 6))
    surgery = tensormoe_torch.replace(model, "<b>", experts=4, rank=2, start="variance")
    said = words(surgery)
    assert "<b>" in said
    for line in str(surgery).splitlines()[-3:]:
        assert " ".join(line.split()) in said


@dataclass(frozen=True)
class Marked(CP):
    """A factorization whose name and repr are not plain text."""

    name: ClassVar[str] = "<i>&"

    def __repr__(self) -> str:
        return "<script>alert(1)</script>"


def test_everything_is_escaped() -> None:
    spec = LayerSpec(8, 6, 4, Marked(2))
    for value in (spec, spec.plan(3)):
        assert "<script" not in value._repr_html_()
        assert "<script>alert(1)</script>" in words(value)
    odd = "<b>&\"'"
    for html in (
        facts_html(odd, {odd: odd}, {odd: spec.draw()}),
        table_html(odd, [[odd, odd], [odd, (odd, odd)]], [odd]),
        text_html(odd, odd),
    ):
        assert words(html).count(odd) >= 2
