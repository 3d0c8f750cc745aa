"""Fewer steps: tokens proposed cheaply, verified in one pass, and never another text than without."""

from .engine import Drafter, DrafterReport, DraftModel, SpeculationReport

__all__ = ["DraftModel", "Drafter", "DrafterReport", "SpeculationReport"]
