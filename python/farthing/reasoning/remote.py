"""A thinking budget on a server that knows none: two requests for one answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..sampling import integer

__all__ = ["RemoteAnswer", "two_phase"]

MESSAGE = "\n\nThere is no time left to think, so here is the answer that follows from the above.\n"


@dataclass(frozen=True)
class RemoteAnswer:
    """What two requests brought.

    Attributes:
        thinking: up to where it ended or was cut.
        text: the answer.
        cut: whether the budget ended the thinking.
        truncated: whether ``max_tokens`` ended the answer.
    """

    thinking: str
    text: str
    cut: bool
    truncated: bool


def two_phase(
    complete: Callable[[str, int, Sequence[str]], tuple[str, str]],
    prompt: str,
    *,
    thinking_budget: int,
    max_tokens: int,
    end: str = "</think>",
    message: str = MESSAGE,
) -> RemoteAnswer:
    """Bounds the thinking of a server that only completes text, as Qwen documents it for its models.

    The first request writes at most ``thinking_budget`` tokens, or up to the end marker; the second one continues
    behind the marker, after a sentence that hands over if the thinking was cut. It costs a second prompt, most of which
    the server has in its cache. farthing's own engine, `farthing.hf.ThinkingLogitsProcessor` and
    `farthing.vllm.thinking_processor` need no second request and end thinking more gently.

    Args:
        complete: ``complete(prompt, max_tokens, stop)`` returns the text, without the stop text, and the reason for its
            end as the completions API has it: ``stop`` or ``length``.
        prompt: rendered by the chat template, ending where thinking begins.
        thinking_budget: most tokens of thinking, at least 1.
        max_tokens: most tokens of thinking and answer, more than ``thinking_budget``.
        end: what ends the thinking.
        message: what is written before it when the thinking is cut.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> def complete(prompt, max_tokens, stop):
        ...     return ("Three and four", "length") if stop else ("7", "stop")
        >>> two_phase(complete, "3 + 4?<think>", thinking_budget=3, max_tokens=20, message=" …").text
        '7'
    """
    budget = integer("thinking_budget", thinking_budget, 1)
    most = integer("max_tokens", max_tokens, budget + 1)
    thinking, reason = complete(prompt, budget, [end])
    cut = reason != "stop"
    close = f"{message if cut else ''}{end}\n\n"
    text, reason = complete(prompt + thinking + close, most - budget, [])
    return RemoteAnswer(thinking, text, cut, reason == "length")
