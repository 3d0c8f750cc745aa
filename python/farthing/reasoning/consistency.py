"""As many samples as a problem needs: drawn until they agree."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..completion import Completion
from ..sampling import SamplingParams, integer, number
from .grading import last_answer_line, last_boxed, plain_number

if TYPE_CHECKING:
    from ..llm import LLM, Conversation, Prompt

__all__ = ["Consensus", "answer_key", "decided", "majority_confidence", "self_consistency"]


@dataclass(frozen=True)
class Consensus:
    """What samples agreed on.

    Attributes:
        answer: the answer with the most votes, the earliest of several; None when no sample gave one.
        votes: votes by answer, of the samples that were judged, the most first.
        judged: samples that were waited for.
        completions: all that were begun, in order; those behind the judged ones were cancelled or had ended by then.
        stopped: ``all`` samples were judged, the majority was ``decided``, or its ``posterior`` was high enough.
    """

    answer: str | None
    votes: dict[str, int]
    judged: int
    completions: list[Completion]
    stopped: str

    @property
    def tokens(self) -> int:
        """Everything computed behind the prompt, by cancelled samples too, probes included."""
        ledgers = [completion.ledger for completion in self.completions]
        return sum(ledger.output_tokens + ledger.probe_tokens for ledger in ledgers)

    @property
    def best(self) -> Completion | None:
        """The first completion that gave the answer."""
        judged = self.completions[: self.judged]
        return next((each for each in judged if self.answer and answer_key(each.text) == self.answer), None)


def self_consistency(
    llm: LLM,
    prompt: Prompt | Conversation,
    samples: int = 8,
    params: SamplingParams | None = None,
    *,
    agree: float | None = None,
    together: int = 4,
    key: Callable[[str], str | None] | None = None,
) -> Consensus:
    """Lossy. Draws answers until their majority stands: self-consistency (arXiv 2203.11171), stopped early.

    Samples are judged in the order they were begun, so the answer depends on the seed alone, never on which sample is
    done first. As soon as the votes that are left can't change the majority, what is still running is cancelled; the
    answer is then the one that all samples would have given. Under ``agree`` drawing also stops when the leading
    answer is, by the posterior under a uniform prior, the likelier one of the two most frequent with at least this
    probability (the Beta rule of Adaptive-Consistency, arXiv 2305.11860), which may give another answer than all
    samples would. Tokens of cancelled samples are counted.

    Args:
        llm: the model.
        prompt: text, token ids or a conversation, as `LLM.stream` takes.
        samples: answers at most.
        params: how to draw; needs a temperature. Sample k has seed + k. None: 1024 tokens, temperature 0.7, top-p 0.95.
        agree: the posterior that is enough, above 0.5 and below 1; None stops only when the majority is decided.
        together: samples that run at the same time: more take less time and waste more tokens.
        key: what an answer's text votes for, None for nothing; by default its ``Answer:`` line or last box.

    Raises:
        ValueError: an argument is out of range, or the temperature is 0.

    Example:
        ``ft.reasoning.self_consistency(llm, messages, samples=8, agree=0.95).answer``
    """
    params = params if params is not None else SamplingParams(max_tokens=1024, temperature=0.7, top_p=0.95)
    integer("samples", samples, 1)
    integer("together", together, 1)
    if params.temperature == 0:
        raise ValueError("params: got temperature 0, expected a temperature, since all samples would be the same")
    if agree is not None and not 0.5 < number("agree", agree) < 1:
        raise ValueError(f"agree: got {agree!r}, expected a probability above 0.5 and below 1")
    vote = answer_key if key is None else key
    running = deque(llm.stream(prompt, _nth(params, k)) for k in range(min(samples, together)))
    completions: list[Completion] = []
    votes: dict[str, int] = {}
    stopped, begun = "all", len(running)
    while running:
        completions.append(running.popleft().completion)
        if (answer := vote(completions[-1].text)) is not None:
            votes[answer] = votes.get(answer, 0) + 1
        if len(completions) == samples:
            break
        if decided(votes, samples - len(completions)):
            stopped = "decided"
            break
        if agree is not None and majority_confidence(votes) >= agree:
            stopped = "posterior"
            break
        if begun < samples:
            running.append(llm.stream(prompt, _nth(params, begun)))
            begun += 1
    for stream in running:
        stream.close()
    judged = len(completions)
    completions += [stream.completion for stream in running]
    # max and sorted keep the first of equals: a tie is the earliest answer's.
    ranked = dict(sorted(votes.items(), key=lambda pair: -pair[1]))
    return Consensus(next(iter(ranked), None), ranked, judged, completions, stopped)


def answer_key(text: str) -> str | None:
    r"""What an answer votes for: its last ``Answer:`` line or box, numbers in one form; None without either.

    Examples:
        >>> answer_key("Answer: $1,200.0") == answer_key(r"so \boxed{1200}")
        True
    """
    line = last_answer_line(text)
    answer = last_boxed(line or "") or line or last_boxed(text)
    if answer is None:
        return None
    exact = plain_number(answer)
    return str(exact) if exact is not None else "".join(answer.split()).replace("\\dfrac", "\\frac")


def decided(votes: Mapping[str, int], left: int) -> bool:
    """Whether ``left`` more votes can't change who leads; a tie is the earlier answer's.

    Examples:
        >>> decided({"7": 3, "8": 1}, 1), decided({"7": 3, "8": 1}, 3)
        (True, False)
    """
    if not votes:
        return left == 0
    names = list(votes)
    leader = max(names, key=votes.__getitem__)
    # Those who came before it win a tie, so they must not even reach it.
    before = max((votes[name] + left for name in names[: names.index(leader)]), default=-1)
    after = max((votes[name] for name in names[names.index(leader) + 1 :]), default=0) + left
    return votes[leader] > before and votes[leader] >= after


def majority_confidence(votes: Mapping[str, int]) -> float:
    """Posterior probability that the leading answer is likelier than the next, under a uniform prior on their shares.

    With a and b votes it is the mass above one half of Beta(a + 1, b + 1).

    Examples:
        >>> majority_confidence({"7": 4}), majority_confidence({"7": 1, "8": 1})
        (0.96875, 0.5)
    """
    first, second = [*sorted(votes.values(), reverse=True), 0, 0][:2]
    count = first + second + 1
    return float(sum(math.comb(count, k) for k in range(first + 1)) / 2**count)


def _nth(params: SamplingParams, sample: int) -> SamplingParams:
    return params if params.seed is None else replace(params, seed=(params.seed + sample) % 2**64)
