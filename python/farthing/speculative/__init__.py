"""Fewer steps: tokens proposed cheaply, verified in one pass, and never another text than without."""

from .engine import Drafter, DrafterReport, DraftModel, SpeculationReport
from .medusa import Medusa
from .medusa_training import MedusaTraining, train_medusa
from .mtp import MTP

__all__ = [
    "MTP",
    "DraftModel",
    "Drafter",
    "DrafterReport",
    "Medusa",
    "MedusaTraining",
    "SpeculationReport",
    "train_medusa",
]
