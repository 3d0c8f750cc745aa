"""Fewer steps: tokens proposed cheaply, verified in one pass, and never another text than without."""

from .eagle3 import Eagle3
from .engine import Drafter, DrafterReport, DraftModel, SpeculationReport
from .medusa import Medusa
from .medusa_training import MedusaTraining, train_medusa
from .mtp import MTP

__all__ = [
    "MTP",
    "DraftModel",
    "Drafter",
    "DrafterReport",
    "Eagle3",
    "Medusa",
    "MedusaTraining",
    "SpeculationReport",
    "train_medusa",
]
