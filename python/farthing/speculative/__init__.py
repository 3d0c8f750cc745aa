"""Fewer steps: tokens proposed cheaply, verified in one pass, and never another text than without."""

from .drafters import Composed, Draft, Drafter, NGram, Suffix, SuffixStore, TokenRecycling
from .engine import DrafterReport, DraftModel, Proposer, SpeculationReport
from .suffix_cache import SuffixDecodingCache, SuffixDecodingDraft

__all__ = [
    "Composed",
    "Draft",
    "DraftModel",
    "Drafter",
    "DrafterReport",
    "NGram",
    "Proposer",
    "SpeculationReport",
    "Suffix",
    "SuffixDecodingCache",
    "SuffixDecodingDraft",
    "SuffixStore",
    "TokenRecycling",
]
