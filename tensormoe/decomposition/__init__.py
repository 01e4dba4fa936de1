"""Dense experts → factors, with a report of what was lost."""

from __future__ import annotations

from tensormoe.decomposition._controls import Control
from tensormoe.decomposition._curves import (
    ControlCurve,
    ErrorCurve,
    ErrorPoint,
    control_curves,
    error_curves,
)
from tensormoe.decomposition._decompose import decompose
from tensormoe.decomposition._moments import Moments
from tensormoe.decomposition._report import Decomposition, Report
from tensormoe.decomposition._search import Search
from tensormoe.decomposition._watch import Progress

__all__ = [
    "Control",
    "ControlCurve",
    "Decomposition",
    "ErrorCurve",
    "ErrorPoint",
    "Moments",
    "Progress",
    "Report",
    "Search",
    "control_curves",
    "decompose",
    "error_curves",
]
