"""Fewer tokens: thinking that keeps to a budget and ends well."""

from .controller import Controller, ThinkSpec
from .policy import REFLECTION_WORDS, Policy

__all__ = ["REFLECTION_WORDS", "Controller", "Policy", "ThinkSpec"]
