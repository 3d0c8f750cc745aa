"""Fewer steps: tokens proposed cheaply, verified in one pass, and never another text than without."""

from .check import CaseReport, CheckReport, Coin, check
from .drafters import Composed, Draft, Drafter, NGram, Suffix, SuffixStore, TokenRecycling
from .eagle3 import Eagle3
from .engine import DrafterReport, DraftModel, Proposer, SpeculationReport
from .medusa import Medusa
from .medusa_training import MedusaTraining, train_medusa
from .mtp import MTP
from .suffix_cache import SuffixDecodingCache, SuffixDecodingDraft
from .verify import (
    Intersection,
    Verified,
    draw_gumbel,
    probabilities,
    verify_block,
    verify_ensemble,
    verify_greedy,
    verify_gumbel,
    verify_relaxed,
    verify_threshold,
    verify_tokens,
    verify_traversal,
    verify_tree,
    verify_typical,
)

__all__ = [
    "MTP",
    "CaseReport",
    "CheckReport",
    "Coin",
    "Composed",
    "Draft",
    "DraftModel",
    "Drafter",
    "DrafterReport",
    "Eagle3",
    "Intersection",
    "Medusa",
    "MedusaTraining",
    "NGram",
    "Proposer",
    "SpeculationReport",
    "Suffix",
    "SuffixDecodingCache",
    "SuffixDecodingDraft",
    "SuffixStore",
    "TokenRecycling",
    "Verified",
    "check",
    "draw_gumbel",
    "probabilities",
    "train_medusa",
    "verify_block",
    "verify_ensemble",
    "verify_greedy",
    "verify_gumbel",
    "verify_relaxed",
    "verify_threshold",
    "verify_tokens",
    "verify_traversal",
    "verify_tree",
    "verify_typical",
]
