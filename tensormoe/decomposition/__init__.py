"""Dense experts → factors, with a report of what was lost."""

from __future__ import annotations

from tensormoe.decomposition._controls import Control as Control
from tensormoe.decomposition._curves import ControlCurve as ControlCurve
from tensormoe.decomposition._curves import ErrorCurve as ErrorCurve
from tensormoe.decomposition._curves import ErrorPoint as ErrorPoint
from tensormoe.decomposition._curves import control_curves as control_curves
from tensormoe.decomposition._curves import error_curves as error_curves
from tensormoe.decomposition._decompose import decompose as decompose
from tensormoe.decomposition._report import Decomposition as Decomposition
from tensormoe.decomposition._report import Report as Report
from tensormoe.decomposition._search import Search as Search
from tensormoe.decomposition._watch import Progress as Progress

__all__ = [
    "Control",
    "ControlCurve",
    "Decomposition",
    "ErrorCurve",
    "ErrorPoint",
    "Progress",
    "Report",
    "Search",
    "control_curves",
    "decompose",
    "error_curves",
]
