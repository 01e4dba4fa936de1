"""Pictures of networks, plans, fronts, errors and experts."""

from __future__ import annotations

from tensormoe.plotting._errors import draw_errors as draw_errors
from tensormoe.plotting._errors import plot_errors as plot_errors

__all__ = ["draw_errors", "plot_errors"]
