"""Speculation: several tokens drafted cheaply, verified in one pass, and never another text than without."""

from .drafters import Composed, Draft, Drafter, NGram, Suffix, SuffixStore, TokenRecycling
from .suffix_cache import SuffixDecodingCache, SuffixDecodingDraft

__all__ = [
    "Composed",
    "Draft",
    "Drafter",
    "NGram",
    "Suffix",
    "SuffixDecodingCache",
    "SuffixDecodingDraft",
    "SuffixStore",
    "TokenRecycling",
]
