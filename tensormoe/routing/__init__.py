"""Routing of tokens to experts: routers that choose k, tokens in the order of experts, and slots.

Pure functions of arrays of any library. A gate makes coefficients of all experts, which a
factorized layer mixes at once; a router chooses experts that are run one by one, and
soft routing gives every expert averages of tokens.
"""

from __future__ import annotations

from tensormoe.routing._levels import LevelRoutes as LevelRoutes
from tensormoe.routing._levels import choose_levels as choose_levels
from tensormoe.routing._levels import spread as spread
from tensormoe.routing._order import ByExpert as ByExpert
from tensormoe.routing._order import by_expert as by_expert
from tensormoe.routing._pairs import CartesianRoutes as CartesianRoutes
from tensormoe.routing._product import ProductRoutes as ProductRoutes
from tensormoe.routing._product import choose_product as choose_product
from tensormoe.routing._router import Router as Router
from tensormoe.routing._routes import Routes as Routes
from tensormoe.routing._routes import choose as choose
from tensormoe.routing._routes import without_best as without_best
from tensormoe.routing._soft import SoftRoutes as SoftRoutes
from tensormoe.routing._soft import select_experts as select_experts
from tensormoe.routing._soft import soft_routes as soft_routes
from tensormoe.routing._tasks import Ranges as Ranges
from tensormoe.routing._tasks import TaskRoutes as TaskRoutes
from tensormoe.routing._tasks import weigh_tasks as weigh_tasks

__all__ = [
    "ByExpert",
    "CartesianRoutes",
    "LevelRoutes",
    "ProductRoutes",
    "Ranges",
    "Router",
    "Routes",
    "SoftRoutes",
    "TaskRoutes",
    "by_expert",
    "choose",
    "choose_levels",
    "choose_product",
    "select_experts",
    "soft_routes",
    "spread",
    "weigh_tasks",
    "without_best",
]
