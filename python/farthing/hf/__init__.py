"""Plug-ins for transformers. Importing this package imports torch."""

from .accelerate import Report, accelerate, restore

__all__ = ["Report", "accelerate", "restore"]
