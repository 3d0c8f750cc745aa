"""Drafters against recorded answers: how many tokens a pass would have given, without a model.

The corpus is what ``tests/record_replay.py`` wrote: 35 named prompts and the greedy answers of SmolLM2-135M-Instruct.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from farthing.speculative import Draft, Drafter

CORPUS = Path(__file__).parent.parent / "tests" / "data" / "replay.npz"


@dataclass(frozen=True)
class Recording:
    """A prompt (t,), its answer (n,), and the 8 likeliest tokens before each token of the answer, (n, 8)."""

    name: str
    prompt: list[int]
    answer: list[int]
    top: np.ndarray

    @property
    def group(self) -> str:
        return self.name.split("/")[0]


def corpus() -> list[Recording]:
    """All recordings, in order of their names' list."""
    with np.load(CORPUS) as file:
        prompts = np.split(file["prompts"], np.cumsum(file["prompt_lengths"].astype(int))[:-1])
        ends = np.cumsum(file["answer_lengths"].astype(int))[:-1]
        answers, tops = np.split(file["answers"], ends), np.split(file["top"], ends)
        return [
            Recording(str(name), prompt.tolist(), answer.tolist(), top.astype(np.uint32))
            for name, prompt, answer, top in zip(file["names"], prompts, answers, tops, strict=True)
        ]


def right(draft: Draft, coming: list[int]) -> int:
    """Nodes on the path that agrees with what comes."""
    parent, count = -1, 0
    for token in coming:
        children = (i for i, before in enumerate(draft.parents) if before == parent and draft.token_ids[i] == token)
        if (child := next(children, None)) is None:
            break
        parent, count = child, count + 1
    return count


@dataclass
class Count:
    """Passes behind the prompt's, the tokens they gave, and the drafted and accepted ones among them."""

    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def per_pass(self) -> float:
        return self.tokens / self.passes

    @property
    def rate(self) -> float:
        return self.accepted / max(self.drafted, 1)

    def __add__(self, other: Count) -> Count:
        mine, others = vars(self).values(), vars(other).values()
        return Count(*(a + b for a, b in zip(mine, others, strict=True)))


def replay(drafter: Drafter, recording: Recording, budget: int, request: int = 0) -> Count:
    """One request: the first token comes with the prompt, each pass gives what was right and one more."""
    prompt, answer = recording.prompt, recording.answer
    drafter.begin(prompt, request=request)
    drafter.observe(answer[:1], request=request, rows=prompt[-1:], top=recording.top[:1])
    count, at = Count(), 1
    while at < len(answer):
        draft = drafter.draft(budget, request=request)
        accepted = right(draft, answer[at:])
        after = min(at + accepted + 1, len(answer))
        drafter.observe(answer[at:after], request=request, rows=answer[at - 1 : after - 1], top=recording.top[at:after])
        count += Count(1, after - at, len(draft), accepted)
        at = after
    drafter.end(request=request)
    return count


def replay_all(drafter: Drafter, recordings: list[Recording], budget: int) -> dict[str, Count]:
    """The counts of each group, and of all under ``all``."""
    counts: dict[str, Count] = {"all": Count()}
    for request, recording in enumerate(recordings):
        count = replay(drafter, recording, budget, request)
        counts[recording.group] = counts.get(recording.group, Count()) + count
        counts["all"] += count
    return counts
