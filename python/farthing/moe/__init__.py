"""Mixtures of experts: which experts a token goes to."""

from .router import RouterSpec, Routing, route
from .statistics import RoutingStatistics

__all__ = ["RouterSpec", "Routing", "RoutingStatistics", "route"]
