"""Pictures: networks and plans as SVG from the core alone, charts with matplotlib.

``draw_network`` and ``draw_plan`` return a :class:`Drawing`, SVG text that notebooks show; they are
``LayerSpec.draw`` and ``Plan.draw``. The functions ``plot_…`` draw on axes of matplotlib, which
``tensormoe[plot]`` installs; :func:`figure` gives a figure in the library's style and writes it.

>>> from tensormoe import CP, LayerSpec
>>> draw_network(LayerSpec(768, 768, experts=(16, 8), factorization=CP(rank=64)))
Drawing('CP(rank=64)', ...)
"""

from __future__ import annotations

from tensormoe._drawing import Drawing
from tensormoe.plotting._errors import plot_errors
from tensormoe.plotting._experts import plot_experts
from tensormoe.plotting._figure import COLOURS, INK, MUTED, figure, tidy
from tensormoe.plotting._fronts import plot_fronts
from tensormoe.plotting._networks import draw_network, draw_plan, network_text
from tensormoe.plotting._spectra import plot_rank_curves

__all__ = [
    "COLOURS",
    "INK",
    "MUTED",
    "Drawing",
    "draw_network",
    "draw_plan",
    "figure",
    "network_text",
    "plot_errors",
    "plot_experts",
    "plot_fronts",
    "plot_rank_curves",
    "tidy",
]
