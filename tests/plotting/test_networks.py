"""Drawings of networks: one box per factor, one edge per bond, one label per open leg."""

from __future__ import annotations

from collections import Counter
from math import inf
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Hadamard,
    LayerSpec,
    LowRank,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe._drawing import draw_network as drawn
from tensormoe._drawing._shapes import Box, Drawing, Text
from tensormoe.errors import PlanError, SpecError
from tensormoe.factorizations import INPUT, OUTPUT, Factor, Network
from tensormoe.plotting import draw_network, draw_plan, network_text

SVG = "{http://www.w3.org/2000/svg}"
FACTORIZATIONS = [
    CP(64),
    TensorRing(5),
    TensorTrain(9),
    Tucker(8),
    LowRank(9),
    SharedBasis(9),
    BaseDelta(2),
    SharedDelta(2),
    Hadamard(),
    Dense(),
]
EXPERTS = [(512,), (16, 8), (4, 3, 2)]


def groups(drawing: Drawing) -> dict[str, list[ElementTree.Element]]:
    """The groups of an SVG by their class."""
    found: dict[str, list[ElementTree.Element]] = {}
    root = ElementTree.fromstring(drawing.svg)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg",
        "title",
        "g",
        "path",
        "rect",
        "circle",
        "text",
    }
    for group in root.iter(f"{SVG}g"):
        found.setdefault(group.attrib["class"], []).append(group)
    return found


def names(elements: list[ElementTree.Element]) -> list[str]:
    return [element.attrib["data-name"] for element in elements]


def texts(element: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in element.iter(f"{SVG}text")]


def boxes(drawing: Drawing, kinds: tuple[str, ...]) -> list[tuple[float, float, float, float]]:
    """Left, right, top and bottom of every box of some groups."""
    return [
        (
            shape.middle[0] - shape.width / 2,
            shape.middle[0] + shape.width / 2,
            shape.middle[1] - shape.height / 2,
            shape.middle[1] + shape.height / 2,
        )
        for group in drawing.groups
        if group.kind in kinds
        for shape in group.shapes
        if isinstance(shape, Box)
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("factorization", FACTORIZATIONS, ids=lambda each: each.name)
def test_every_factor_bond_and_open_leg_is_there(
    factorization: Any, experts: tuple[int, ...], bias: bool
) -> None:
    spec = LayerSpec(768, 384, experts, factorization, bias)
    network, drawing = spec.network, draw_network(spec)
    found = groups(drawing)
    assert Counter(names(found["factor"])) == Counter(each.name for each in network.factors)
    for group in found["factor"] + found.get("bias", []):
        name = group.attrib["data-name"]
        assert texts(group) == [name, " × ".join(map(str, network.shapes[name]))]
    assert names(found.get("bias", [])) == [each.name for each in network.biases]
    opened = {*network.expert_legs, INPUT, OUTPUT}
    bonds: Counter[str] = Counter()
    own: Counter[str] = Counter()
    for term in network.terms:
        for leg in term.legs:
            count = sum(leg in factor.legs for factor in term.factors)
            if count > 1:
                bonds[leg] += 1
            else:
                assert leg in opened
                own[leg] += 1
    edges = found.get("bond", []) + found.get("open bond", [])
    assert Counter(names(edges)) == bonds
    assert Counter(names(found.get("open", []))) == own
    assert set(names(found.get("open bond", []))) == opened.intersection(bonds)
    for group in edges + found.get("open", []):
        leg = group.attrib["data-name"]
        (label,) = texts(group)
        assert label.split()[:2] == [leg, f"{network.sizes[leg]:,}"]
        word = {INPUT: "in", OUTPUT: "out"}.get(leg, "experts" if leg in opened else None)
        assert label.split()[2:] == ([word] if word else [])
    assert len(found.get("sum", [])) == len(network.terms) - 1
    shared = [term for term in network.terms if not term.legs.issuperset(network.expert_legs)]
    assert len(found.get("note", [])) == len(shared)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("factorization", FACTORIZATIONS, ids=lambda each: each.name)
def test_nothing_overlaps_or_is_cut_off(factorization: Any, experts: tuple[int, ...]) -> None:
    drawing = LayerSpec(768, 384, experts, factorization).draw()
    every = boxes(drawing, ("factor", "bond", "open", "open bond"))
    for left, right, top, bottom in every:
        assert 0 < left < right < drawing.width
        assert 0 < top < bottom < drawing.height
    for place, one in enumerate(every):
        for other in every[:place]:
            beside = one[1] <= other[0] or other[1] <= one[0]
            assert beside or one[3] <= other[2] or other[3] <= one[2]
    for shape in drawing.shapes():
        if isinstance(shape, Text):
            assert 0 < shape.place[0] < drawing.width
            assert 0 < shape.place[1] < drawing.height


def test_hyperedges_meet_in_one_dot() -> None:
    for spec, leg, ends in (
        (LayerSpec(8, 6, (4, 3), CP(2)), "r", 4),
        # three factors, and the output that is open
        (LayerSpec(8, 6, (4, 3), Hadamard()), "o", 4),
    ):
        found = groups(spec.draw())
        (group,) = [
            each
            for each in found.get("bond", []) + found.get("open bond", [])
            if each.attrib["data-name"] == leg
        ]
        assert len(list(group.iter(f"{SVG}circle"))) == 1
        assert len(list(group.iter(f"{SVG}path"))) == ends
    ring = groups(LayerSpec(8, 6, 4, TensorRing(2)).draw())
    assert not [dot for group in ring["bond"] for dot in group.iter(f"{SVG}circle")]


def test_names_are_escaped() -> None:
    name = '<script>alert("&")</script>\x00'
    network = Network(
        (Factor(name, ("n0", INPUT, "r<")), Factor("b", ("r<", OUTPUT))),
        (("n0", 3), (INPUT, 4), (OUTPUT, 5), ("r<", 2)),
    )
    drawing = drawn(network, f"a {name}", "b & c")
    assert "<script" not in drawing.svg
    found = groups(drawing)
    assert names(found["factor"]) == [name.replace("\x00", "\ufffd"), "b"]
    assert names(found["bond"]) == ["r<"]


def test_networks_of_other_shapes() -> None:
    # two bonds between the same factors, a core, a factor without any mode, and a leg that one
    # factor alone has, and that is summed
    legs = {"n0": 3, INPUT: 4, OUTPUT: 5, "a": 2, "b": 2, "c": 2, "d": 2, "e": 2, "f": 2, "s": 7}
    network = Network(
        (
            Factor("x", ("n0", "a", "b", "c")),
            Factor("y", (INPUT, "a", "b", "d")),
            Factor("z", (OUTPUT, "e", "s")),
            Factor("k", ("c", "d", "f")),
            Factor("l", ("f", "e")),
        ),
        tuple(legs.items()),
    )
    found = groups(drawn(network, "own", ""))
    assert Counter(names(found["bond"])) == Counter("abcdef")
    assert len(found["factor"]) == 5
    assert [texts(group) for group in found["summed"]] == [["Σ s  7"]]
    alone = Network((Factor("w", ("n0", INPUT, OUTPUT)),), tuple(legs.items())[:3])
    assert names(groups(drawn(alone, "dense", ""))["open"]) == ["n0", INPUT, OUTPUT]


def test_plans_are_drawn_step_by_step() -> None:
    for spec in (
        LayerSpec(768, 384, (16, 8), TensorRing(5)),
        LayerSpec(768, 384, (16, 8), BaseDelta(2)),
    ):
        plan = spec.plan(32)
        found = groups(draw_plan(plan))
        program = plan.program
        assert sorted(names(found["operand"])) == sorted(each.name for each in program.operands)
        assert names(found["step"]) == [step.kind for step in program.steps]
        edges = [
            f"{slot} {step.output}" for step in program.steps for slot in dict.fromkeys(step.inputs)
        ]
        assert names(found["flow"]) == edges
        sizes = {**program.sizes, "b": 32}
        for group, step in zip(found["step"], program.steps, strict=True):
            shape = " × ".join(f"{leg} {sizes[leg]:,}" for leg in step.legs)
            assert texts(group)[1] == (shape or "1")


def test_lanes_are_of_one_array_each() -> None:
    """No array is drawn on the lane of another one that is still needed."""
    for factorization in FACTORIZATIONS:
        for options in ({}, {"top_k": 2}, {"prepared": True}):
            plan = LayerSpec(24, 18, (6, 5), factorization).plan(7, **options)  # type: ignore[arg-type]
            found = groups(plan.draw())
            rows = sorted(
                (float(dot.attrib["cy"]), float(dot.attrib["cx"]))
                for kind in ("operand", "step")
                for group in found[kind]
                for dot in group.iter(f"{SVG}circle")
            )
            assert len({y for y, _ in rows}) == len(rows)
            spans: dict[tuple[float, float], float] = {}
            for group in found["flow"]:
                numbers = [
                    float(word)
                    for path in group.iter(f"{SVG}path")
                    for word in path.attrib["d"].replace("M", " ").replace("L", " ").split()
                    if word not in "CL" and not word.startswith("C")
                ]
                start = (numbers[0], numbers[1])
                spans[start] = max(spans.get(start, -inf), numbers[-1])
            for (x, top), bottom in spans.items():
                between = [y for y, other in rows if other == x and top < y < bottom]
                assert not between, (factorization, options)


def test_a_plan_in_chunks_shows_one_of_them() -> None:
    plan = LayerSpec(64, 64, 16, CP(256)).plan(1000, memory_limit=700 * 1024)
    assert plan.chunk < 1000
    said = [text for group in groups(plan.draw())["operand"] for text in texts(group)]
    assert f"b {plan.chunk:,} × i 64" in said


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_drawings_are_saved(tmp_path: Path, suffix: str) -> None:
    drawing = LayerSpec(8, 6, 4, BaseDelta(2)).draw()
    path = tmp_path / f"network{suffix}"
    drawing.save(path)
    start = {".svg": b"<svg", ".png": b"\x89PNG", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    if suffix == ".svg":
        assert path.read_text("utf-8") == drawing.svg == drawing._repr_svg_()
    for name, said in (
        ("network.txt", "path must end in one of"),
        ("a\0.svg", "path must not hold a null"),
        ("missing/network.svg", "the folder of path must exist"),
    ):
        with pytest.raises(SpecError, match=said):
            drawing.save(tmp_path / name)


def test_what_is_not_drawn() -> None:
    for call in (draw_network, network_text):
        with pytest.raises(SpecError, match="spec must be a LayerSpec; got"):
            call(CP(2))  # type: ignore[operator]
    with pytest.raises(PlanError, match="plan must be a Plan; got"):
        draw_plan(CP(2))  # type: ignore[arg-type]
    plan = LayerSpec(8, 6, 4, CP(2)).plan(3)
    with pytest.raises(PlanError, match="itemsize must be a positive integer"):
        plan.draw(itemsize=0)
    with pytest.raises(PlanError, match="roofline must be a Roofline or None"):
        plan.describe(roofline="cpu")  # type: ignore[arg-type]


def test_pictures_of_pixels_have_what_the_text_has(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    drawing = LayerSpec(8, 6, 4, CP(2)).draw()
    drawing.save(tmp_path / "network.png")
    pixels = imread(tmp_path / "network.png")
    assert pixels.shape == (2 * round(drawing.height), 2 * round(drawing.width), 4)
    # the ground is transparent, and a factor's box is there in its colour
    assert pixels[2, 2, 3] == 0.0
    left, _, top, bottom = boxes(drawing, ("factor",))[0]
    edge = pixels[int(top + bottom), int(2 * left + 8)]
    assert edge[3] == 1.0
    assert tuple(round(255 * float(value)) for value in edge[:3]) == (0x1F, 0x6F, 0xB2)


def test_text_has_every_array_and_every_term() -> None:
    spec = LayerSpec(8, 6, 4, BaseDelta(2))
    text = network_text(spec)
    assert "plus" in text
    for name in ("coefficients_0", "x", "base", "input", "output", "y"):
        assert name in text
    assert text.count("●") == 2 + 1 + 2 + (1 + 1 + 3 + 3 + 1)
