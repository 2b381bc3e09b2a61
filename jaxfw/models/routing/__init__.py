"""Who goes to which expert, and who runs them."""

from jaxfw.models.routing.dense import Dense
from jaxfw.models.routing.limit import Limit
from jaxfw.models.routing.parallel import ExpertParallel
from jaxfw.models.routing.route import (
    Experts,
    ExpertStats,
    Route,
    RouteContext,
    Router,
    RouterAux,
    SlotRoute,
    SoftRoute,
    TokenRoute,
    check_route,
)
from jaxfw.models.routing.routers import ExpertChoice, SoftChoice, TokenChoice
from jaxfw.models.routing.sorted import Sorted

__all__ = [
    "Dense", "ExpertChoice", "ExpertParallel", "ExpertStats", "Experts", "Limit", "Route", "RouteContext", "Router",
    "RouterAux", "SlotRoute", "SoftChoice", "SoftRoute", "Sorted", "TokenChoice", "TokenRoute", "check_route",
]  # fmt: skip
