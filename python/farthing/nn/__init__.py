"""Torch modules whose weights are packed, or train towards it. Importing this package imports torch."""

from .bit_linear import BitLinear
from .experts import Experts
from .linear import Linear
from .routing import load_balancing_loss, router_z_loss
from .sparse_moe import FloatExperts, SparseMoe

__all__ = ["BitLinear", "Experts", "FloatExperts", "Linear", "SparseMoe", "load_balancing_loss", "router_z_loss"]
