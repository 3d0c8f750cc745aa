"""Plug-ins for transformers. Importing this package imports torch."""

from .accelerate import Report, accelerate, restore
from .experts import Expert, Experts, describe_experts

__all__ = ["Expert", "Experts", "Report", "accelerate", "describe_experts", "restore"]
