"""Networks and plans are drawn where neither NumPy nor matplotlib can be imported."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from tests._python import run_python

DRAW = """
import sys

for name in ("cupy", "jax", "jaxlib", "matplotlib", "numpy", "rich", "scipy", "torch"):
    sys.modules[name] = None  # importing it now fails as if it weren't installed

import tensormoe

loaded = [name for name in sys.modules if name.startswith("tensormoe.plotting")]
assert not loaded, loaded
assert "tensormoe._drawing" not in sys.modules

from tensormoe import Hadamard, LayerSpec
from tensormoe.errors import MissingDependencyError

spec = LayerSpec(16, 12, experts=(6, 5), factorization=Hadamard())
plan = spec.plan(32)
for value in (spec, plan, plan.cost(), tensormoe.rank_front("cp", 16, 12, 6)[0]):
    assert value._repr_html_().startswith('<div class="tensormoe">')
spec.draw().save(sys.argv[1])
try:
    plan.draw().save(sys.argv[2])
except MissingDependencyError as error:
    assert "pip install 'tensormoe[plot]'" in str(error)
else:
    raise AssertionError("painted without matplotlib")
print(plan.draw()._repr_svg_())

from tensormoe.plotting import draw_network

assert draw_network(spec).svg == spec.draw().svg
"""


def test_drawings_need_no_array_library(tmp_path: Path) -> None:
    svg, png = tmp_path / "network.svg", tmp_path / "plan.png"
    done = run_python("-W", "error", "-c", DRAW, svg, png)
    assert done.returncode == 0, done.stderr
    assert ElementTree.fromstring(done.stdout).tag.endswith("svg")
    assert ElementTree.fromstring(svg.read_text("utf-8")).tag.endswith("svg")
    assert not png.exists()
