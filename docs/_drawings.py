"""The drawings of tensor networks in README.md and the documentation, as SVG.

    python docs/_drawings.py          # write docs/images/*.svg

A node is an array, a line a leg that two nodes share, an open line a leg of the whole tensor. A dot
joins more than two. The ground is transparent, and the colours read on white and on black.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"

FACTOR, EXPERT, GATE, INPUT, WHOLE = (
    "#3a7fc1",
    "#c2621f",
    "#2c9168",
    "#8a63b8",
    "#5f7085",
)
LINE, TEXT = "#7c8899", "#7a8595"
RADIUS = 19

STYLE = f"""
text {{ font-family: system-ui, 'DejaVu Sans', sans-serif; font-size: 15px; fill: {TEXT};
  text-anchor: middle; dominant-baseline: central; }}
.title {{ font-size: 16px; font-weight: 600; }}
.name {{ fill: #fff; font-weight: 600; }}
.leg {{ font-style: italic; }}
.sign {{ font-size: 28px; }}
line, path {{ stroke: {LINE}; stroke-width: 2.2; fill: none; stroke-linecap: round; }}
.cut {{ stroke: #d1495b; stroke-width: 2.6; stroke-dasharray: 7 6; }}
.cutname {{ fill: #d1495b; font-weight: 600; }}
"""


@dataclass
class Drawing:
    """Shapes in pixels: lines first, so that nodes cover their ends."""

    width: int
    height: int
    title: str
    lines: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    places: dict[str, tuple[float, float]] = field(default_factory=dict)
    dots: set[str] = field(default_factory=set)
    ends: list[list[tuple[float, float]]] = field(default_factory=list)

    def node(
        self, key: str, x: float, y: float, name: str, colour: str = FACTOR
    ) -> None:
        self.places[key] = (x, y)
        self.shapes.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="{RADIUS}" fill="{colour}"/>'
        )
        self.text(x, y, name, "name")

    def box(self, key: str, x: float, y: float, name: str) -> None:
        self.places[key] = (x, y)
        self.shapes.append(
            f'<rect x="{x - 32:g}" y="{y - 32:g}" width="64" height="64" rx="9" fill="{WHOLE}"/>'
        )
        self.text(x, y, name, "name")

    def dot(self, key: str, x: float, y: float) -> None:
        self.places[key] = (x, y)
        self.dots.add(key)
        self.shapes.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="{LINE}"/>'
        )

    def bond(
        self, first: str, second: str, name: str = "", side: float = 14
    ) -> None:
        """A line between two nodes; its name stands ``side`` pixels to its right."""
        (x1, y1), (x2, y2) = self.places[first], self.places[second]
        self._line((x1, y1), (x2, y2))
        if name:
            length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
            right = (-(y2 - y1) / length, (x2 - x1) / length)
            self.text(
                (x1 + x2) / 2 + side * right[0],
                (y1 + y2) / 2 + side * right[1],
                name,
                "leg",
            )

    def leg(self, key: str, dx: float, dy: float, name: str) -> None:
        """An open line, named at its end."""
        x, y = self.places[key]
        length = (dx * dx + dy * dy) ** 0.5
        self._line((x, y), (x + dx, y + dy))
        self.text(
            x + dx * (1 + 12 / length), y + dy * (1 + 12 / length), name, "leg"
        )

    def cut(self, path: str, x: float, y: float, name: str) -> None:
        self.shapes.append(f'<path class="cut" d="{path}"/>')
        self.text(x, y, name, "cutname")

    def _line(
        self, start: tuple[float, float], end: tuple[float, float]
    ) -> None:
        (x1, y1), (x2, y2) = start, end
        self.ends.append([start, end])
        self.lines.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'
        )

    def text(self, x: float, y: float, words: str, kind: str) -> None:
        self.shapes.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>'
        )

    def svg(self) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n"
            + "\n".join([*self.lines, *self.shapes])
            + "\n</svg>\n"
        )


def layer() -> Drawing:
    """The dense layer, and the same as a ring: the picture of the README."""
    new = Drawing(
        760, 250, "A layer: gate, experts and input, dense and as a tensor ring"
    )
    new.text(165, 18, "N dense experts: one tensor", "title")
    new.box("W", 165, 165, "W")
    new.node("a", 165, 68, "a", GATE)
    new.node("x", 60, 165, "x", INPUT)
    new.bond("a", "W", "N = 512", -40)
    new.bond("x", "W", "768")
    new.leg("W", 90, 0, "y")
    new.text(165, 225, "302 million parameters", "leg")
    new.text(335, 140, "=", "sign")
    new.text(555, 18, "the same experts, stored as a ring", "title")
    new.node("a1", 470, 62, "a₁", GATE)
    new.node("a2", 640, 62, "a₂", GATE)
    new.node("e1", 470, 115, "", EXPERT)
    new.node("e2", 640, 115, "", EXPERT)
    new.node("in", 640, 185, "")
    new.node("out", 470, 185, "")
    new.node("z", 715, 185, "x", INPUT)
    new.bond("a1", "e1", "16", 17)
    new.bond("a2", "e2", "32", -17)
    new.bond("e1", "e2", "r₁")
    new.bond("e2", "in", "r₂")
    new.bond("in", "out", "r₃", -14)
    new.bond("out", "e1", "r₀")
    new.bond("in", "z")
    new.leg("out", -60, 0, "y")
    new.text(555, 225, "588,818 parameters, gate included", "leg")
    return new


def dense() -> Drawing:
    new = Drawing(
        260, 170, "Dense: one array with an expert, an input and an output leg"
    )
    new.box("W", 130, 100, "W")
    new.leg("W", 0, -62, "N")
    new.leg("W", -80, 0, "I")
    new.leg("W", 80, 0, "O")
    return new


def cp() -> Drawing:
    new = Drawing(260, 170, "CP: three factors that share one bond")
    new.dot("r", 130, 108)
    _three(new, 130, 52, 62, 140, 198, 140)
    for key in ("n", "i", "o"):
        new.bond("r", key, "R" if key == "n" else "")
    return new


def tensor_ring() -> Drawing:
    new = Drawing(
        260, 170, "Tensor ring: three factors in a circle of three bonds"
    )
    _three(new, 130, 52, 70, 132, 190, 132)
    new.bond("o", "n", "r₁")
    new.bond("n", "i", "r₂", 14)
    new.bond("i", "o", "r₃", 14)
    return new


def tensor_train() -> Drawing:
    new = Drawing(
        260, 170, "Tensor train: three factors in a line with two bonds"
    )
    for key, x, colour, leg in (
        ("n", 50, EXPERT, "N"),
        ("i", 130, FACTOR, "I"),
    ):
        new.node(key, x, 110, "", colour)
        new.leg(key, 0, -46, leg)
    new.node("o", 210, 110, "")
    new.leg("o", 0, -46, "O")
    new.bond("n", "i", "r₁")
    new.bond("i", "o", "r₂")
    return new


def tucker() -> Drawing:
    new = Drawing(260, 170, "Tucker: a core with one factor per leg")
    new.node("core", 130, 118, "")
    new.node("n", 130, 52, "", EXPERT)
    new.node("i", 62, 118, "")
    new.node("o", 198, 118, "")
    new.leg("n", 0, -28, "N")
    new.leg("i", -38, 0, "I")
    new.leg("o", 38, 0, "O")
    new.bond("core", "n", "p")
    new.bond("i", "core", "q")
    new.bond("core", "o", "s")
    return new


def hadamard() -> Drawing:
    new = Drawing(260, 170, "Hadamard: two factors whose output legs are one")
    new.node("n", 100, 60, "", EXPERT)
    new.node("i", 100, 130, "")
    new.dot("dot", 165, 95)
    new.leg("n", -56, 0, "N")
    new.leg("i", -56, 0, "I")
    new.bond("n", "dot")
    new.bond("i", "dot")
    new.leg("dot", 52, 0, "O")
    return new


def shared_basis() -> Drawing:
    new = Drawing(
        260,
        170,
        "Shared basis: J shared matrices, and one small factor per expert",
    )
    new.node("alpha", 66, 62, "", EXPERT)
    new.node("own", 194, 62, "", EXPERT)
    new.node("basis", 130, 132, "")
    new.dot("n", 130, 40)
    new.bond("alpha", "n")
    new.bond("n", "own")
    new.leg("n", 0, -14, "N")
    new.bond("alpha", "basis", "J")
    new.bond("basis", "own", "r")
    new.leg("basis", -72, 0, "I")
    new.leg("own", 46, 0, "O")
    return new


def low_rank() -> Drawing:
    new = Drawing(
        260,
        170,
        "Low rank: a product of two small factors per expert",
    )
    new.node("u", 88, 60, "", EXPERT)
    new.node("v", 88, 128, "", EXPERT)
    new.dot("n", 150, 94)
    new.bond("u", "v", "r")
    new.bond("u", "n")
    new.bond("v", "n")
    new.leg("n", 30, 0, "N")
    new.leg("u", -46, 0, "I")
    new.leg("v", -46, 0, "O")
    return new


def base_delta() -> Drawing:
    new = Drawing(
        260,
        170,
        "Base and deltas: one full matrix plus a difference per expert",
    )
    new.node("base", 48, 110, "")
    new.leg("base", 0, -44, "I")
    new.leg("base", 0, 38, "O")
    new.text(98, 110, "+", "sign")
    new.node("u", 150, 76, "", EXPERT)
    new.node("v", 150, 144, "", EXPERT)
    new.dot("n", 206, 110)
    new.bond("u", "v", "r")
    new.bond("u", "n")
    new.bond("v", "n")
    new.leg("n", 26, 0, "N")
    new.leg("u", 0, -34, "I")
    new.leg("v", -36, 0, "O")
    return new


def _three(
    new: Drawing,
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    x3: float,
    y3: float,
) -> None:
    """Expert factor above, input factor at the left, output factor at the right."""
    new.node("n", x1, y1, "", EXPERT)
    new.node("i", x2, y2, "")
    new.node("o", x3, y3, "")
    new.leg("n", 0, -28, "N")
    new.leg("i", -40, 0, "I")
    new.leg("o", 40, 0, "O")


def capacity() -> Drawing:
    """Both capacities of a ring as cuts."""
    new = Drawing(
        760, 270, "Expert rank and expert span of a tensor ring as minimum cuts"
    )
    for shift, title in (
        (0, "expert rank: between I and O"),
        (380, "expert span: between N and the rest"),
    ):
        new.text(190 + shift, 18, title, "title")
        x = 190 + shift
        new.node(f"n{shift}", x, 92, "", EXPERT)
        new.node(f"i{shift}", x - 75, 190, "")
        new.node(f"o{shift}", x + 75, 190, "")
        new.leg(f"n{shift}", 0, -34, "N" if shift else "n fixed")
        new.leg(f"i{shift}", -48, 0, "I")
        new.leg(f"o{shift}", 48, 0, "O")
        new.bond(f"o{shift}", f"n{shift}", "r₁", 15)
        new.bond(f"n{shift}", f"i{shift}", "r₂", 15)
        new.bond(f"i{shift}", f"o{shift}", "r₃", -13)
    new.cut("M 100 116 Q 165 150 172 226", 190, 246, "cuts r₂ and r₃")
    new.cut("M 496 150 Q 570 112 644 150", 570, 246, "cuts r₁ and r₂")
    return new


def residual() -> Drawing:
    """A frozen layer with a mixture, and a sparse model's experts with one."""
    new = Drawing(
        810,
        305,
        "A mixture added to a frozen layer, and one added to all experts of a sparse model",
    )
    new.text(190, 18, "any layer: y = W x + μMoE(x)", "title")
    new.node("x", 40, 130, "x", INPUT)
    new.box("W", 190, 80, "W")
    new.text(190, 128, "frozen", "leg")
    new.node("in", 125, 180, "")
    new.dot("r", 190, 180)
    new.node("out", 255, 180, "0")
    new.node("e", 190, 225, "", EXPERT)
    new.node("a", 190, 280, "a", GATE)
    new.node("sum", 335, 130, "+", WHOLE)
    new.bond("x", "W")
    new.bond("x", "in")
    new.bond("in", "r")
    new.bond("r", "out")
    new.bond("r", "e", "R", -14)
    new.bond("e", "a", "N", -14)
    new.bond("W", "sum")
    new.bond("out", "sum")
    new.leg("sum", 45, 0, "y")
    new.text(610, 18, "experts of a router: all Wₙ + ΔWₙ", "title")
    new.box("V", 490, 150, "W")
    new.leg("V", 0, -62, "N")
    new.leg("V", -55, 0, "I")
    new.leg("V", 55, 0, "O")
    new.text(490, 203, "frozen, where it was", "leg")
    new.text(590, 150, "+", "sign")
    new.dot("s", 675, 158)
    _three(new, 675, 100, 630, 195, 720, 195)
    for key in ("n", "i", "o"):
        new.bond("s", key, "R" if key == "n" else "")
    return new


def convolution() -> Drawing:
    """Three ways to contract the network of a convolution's experts."""
    new = Drawing(
        820, 270, "Experts of a convolution in CP, and what is contracted first"
    )
    panels = (
        ("patches", "every patch is a row"),
        ("convolution", "the input factor is a kernel"),
        ("kernels", "one kernel per image"),
    )
    for place, (name, words) in enumerate(panels):
        shift = 266 * place + 14
        new.text(134 + shift, 18, name, "title")
        keys = {key: f"{key}{place}" for key in "anxiro"}
        new.node(keys["a"], 134 + shift, 62, "a", GATE)
        new.node(keys["n"], 134 + shift, 112, "", EXPERT)
        new.node(keys["x"], 34 + shift, 170, "x", INPUT)
        new.node(keys["i"], 94 + shift, 170, "")
        new.dot(keys["r"], 134 + shift, 150)
        new.node(keys["o"], 174 + shift, 170, "")
        new.bond(keys["a"], keys["n"], "N", 15)
        for key in "nio":
            new.bond(keys["r"], keys[key])
        new.text(150 + shift, 140, "R", "leg")
        new.bond(keys["x"], keys["i"])
        new.leg(keys["o"], 44, 0, "O")
        new.text(134 + shift, 250, words, "leg")
    new.cut("M 20 142 h 56 v 56 h -56 Z", 50, 216, "unfolded")
    new.cut("M 286 142 h 116 v 56 h -116 Z", 344, 216, "convolved")
    new.cut("M 612 36 h 134 v 162 h -134 Z", 679, 216, "contracted first")
    return new


DRAWINGS = {
    "layer": layer,
    "network-dense": dense,
    "network-cp": cp,
    "network-tensor-ring": tensor_ring,
    "network-tensor-train": tensor_train,
    "network-tucker": tucker,
    "network-hadamard": hadamard,
    "network-low-rank": low_rank,
    "network-shared-basis": shared_basis,
    "network-base-delta": base_delta,
    "capacity": capacity,
    "conv-moe": convolution,
    "residual": residual,
}


def main() -> None:
    for name, draw in DRAWINGS.items():
        (IMAGES / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
