"""Torch modules whose weights are packed. Importing this package imports torch."""

from .bit_linear import BitLinear
from .experts import Experts
from .linear import Linear

__all__ = ["BitLinear", "Experts", "Linear"]
