"""Mixtures of experts: which experts a token goes to, and experts with packed weights."""

from .clusters import balanced_clusters
from .experts import Expert, PackedExperts, RunStatistics
from .router import RouterSpec, Routing, route
from .statistics import RoutingStatistics

__all__ = [
    "Expert",
    "PackedExperts",
    "RouterSpec",
    "Routing",
    "RoutingStatistics",
    "RunStatistics",
    "balanced_clusters",
    "route",
]
