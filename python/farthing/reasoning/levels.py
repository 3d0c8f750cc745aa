"""Thinking truncated at levels, from small to large, until the answer has settled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..sampling import SamplingParams, integer
from .consistency import answer_key

if TYPE_CHECKING:
    from ..llm import LLM, Conversation

__all__ = ["Settled", "truncation_levels"]

PROBE = "\n\nFinal answer: \\boxed{"
PROBE_TOKENS = 16


@dataclass(frozen=True)
class Settled:
    """An answer, and where it settled.

    Attributes:
        text: what was thought, closed by the probe that gave the answer where it was cut.
        answer: the answer, None when there was none.
        level: number of the level that ended it, from 0; the number of levels if it ended by itself.
        thinking_tokens: drawn before the last probe.
        probe_tokens: of all probes, their forced text and what they drew.
        truncated: no answer had settled when the last level was spent.
    """

    text: str
    answer: str | None
    level: int
    thinking_tokens: int
    probe_tokens: int
    truncated: bool

    @property
    def tokens(self) -> int:
        """Everything computed behind the prompt, probes included."""
        return self.thinking_tokens + self.probe_tokens


def truncation_levels(
    llm: LLM,
    conversations: Sequence[Conversation],
    levels: Sequence[int] = (64, 96, 144, 216, 324),
    *,
    agree: int = 2,
    params: SamplingParams | None = None,
) -> list[Settled]:
    """Lossy. Lets each conversation's answer grow level by level, and stops where probes agree.

    DART (arXiv 2511.01170) trains a model on the shortest truncation of its reasoning that is still right; this is the
    same idea without training: at every level the model is asked, behind what it has written so far, for the final
    answer in a box, and when ``agree`` levels in a row give the same one, that is the answer. Easy problems end at the
    first levels, hard ones run on to the last or until the model ends by itself. Pages of the prompt and of what was
    written are reused from level to level; probes and their forced text are counted as tokens.

    It is for models that go on thinking when they know the answer. Where the last step is what gives the answer, as in
    a small model's short solutions, probes meet confident intermediate results: accuracy falls before tokens do
    (``python -m benches.reasoning difficulty`` draws the curve).

    Args:
        llm: the model, with a chat template.
        conversations: one for each problem; a level's continuations are batched.
        levels: tokens at which to probe, ascending.
        agree: probes in a row that must give the same answer.
        params: how to draw; ``max_tokens`` is the last level's affair. None is greedy.

    Raises:
        ValueError: an argument is out of range.

    Example:
        ``ft.reasoning.truncation_levels(llm, [messages], levels=(64, 128, 256))[0].answer``
    """
    counts = [integer("levels", level, 1) for level in levels]
    if not counts or counts != sorted(set(counts)):
        raise ValueError(f"levels: got {list(levels)}, expected ascending numbers of tokens")
    integer("agree", agree, 1, len(counts))
    params = params if params is not None else SamplingParams()
    runs = [_Run(llm.tokenizer.encode(llm.chat_prompt(turns))) for turns in conversations]
    probe, stop = llm.tokenizer.encode(PROBE), replace(params, temperature=0.0, max_tokens=PROBE_TOKENS, stop="}")
    for level, (before, count) in enumerate(zip([0, *counts], counts, strict=False)):
        live = [run for run in runs if run.settled is None]
        if not live:
            break
        grown = llm.generate([run.prompt + run.written for run in live], replace(params, max_tokens=count - before))
        for run, completion in zip(live, grown, strict=True):
            run.written += completion.token_ids
            if completion.finish_reason != "length":
                text = llm.tokenizer.decode(run.written)
                run.settled = Settled(text, answer_key(text), len(counts), len(run.written), run.probe_tokens, False)
        live = [run for run in live if run.settled is None]
        if not live:
            continue
        probes = llm.generate([run.prompt + run.written + probe for run in live], stop)
        for run, completion in zip(live, probes, strict=True):
            run.probe_tokens += len(probe) + len(completion.token_ids)
            closed = f"{PROBE}{completion.text}}}"
            run.answers.append(answer_key(closed) if completion.text.strip() else None)
            last = run.answers[-agree:]
            settled = len(last) == agree and last[0] is not None and len(set(last)) == 1
            if settled or level == len(counts) - 1:
                text = llm.tokenizer.decode(run.written) + closed
                run.settled = Settled(text, run.answers[-1], level, len(run.written), run.probe_tokens, not settled)
    return [run.settled for run in runs if run.settled is not None]


class _Run:
    """One conversation on its way."""

    def __init__(self, prompt: list[int]) -> None:
        self.prompt, self.written = prompt, list[int]()
        self.answers: list[str | None] = []
        self.probe_tokens = 0
        self.settled: Settled | None = None
