"""Records the replay corpus: what the default model says to 35 named prompts, as token ids.

``python tests/record_replay.py`` writes ``tests/data/replay.npz`` anew: for each prompt its ids, the greedy answer of
at most 112 tokens, and the 8 likeliest tokens before each token of the answer. ``benches/replay.py`` replays drafters
against these ids without a model.

The prompts are the first turns of every sixteenth question of each Spec-Bench group (its chat group is MT-bench), and
five passages of ``tests/data/alice.txt`` that are to be repeated.
"""

from __future__ import annotations

import json
from pathlib import Path

import farthing as ft
import numpy as np
from conftest import DATA

HERE = Path(__file__).parent / "data"
# Spec-Bench's groups: the first of their 80 question ids.
GROUPS = {"chat": 81, "translation": 161, "summarisation": 241, "qa": 321, "maths": 401, "rag": 481}
MOST = 112
TOP = 8


def questions() -> dict[str, str]:
    """Name of each prompt, and its text."""
    lines = (DATA / "eval" / "spec_bench_question.jsonl").read_text(encoding="utf-8").splitlines()
    turns = {question["question_id"]: question["turns"][0] for question in map(json.loads, lines)}
    prompts = {f"{group}/{first + i}": turns[first + i] for group, first in GROUPS.items() for i in range(0, 80, 16)}
    passages = [p.replace("\n", " ") for p in (HERE / "alice.txt").read_text(encoding="utf-8").split("\n\n")]
    passages = [passage for passage in passages if 30 <= len(passage.split()) <= 120][:5]
    return prompts | {f"copy/{i}": f"Repeat this text:\n\n{passage}" for i, passage in enumerate(passages)}


def main() -> None:
    llm = ft.LLM("smollm2-135m", speculation=None)
    asked = questions()
    prompts = [
        llm.tokenizer.encode(llm.chat_prompt([{"role": "user", "content": text}]), add_special_tokens=False)
        for text in asked.values()
    ]
    answers = [c.token_ids for c in llm.generate(prompts, ft.SamplingParams(max_tokens=MOST, temperature=0.0))]
    top = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = llm.logits([*prompt, *answer])[len(prompt) - 1 : -1]
        likeliest = np.argsort(-logits, axis=1, kind="stable")[:, :TOP]
        if likeliest[:, 0].tolist() != list(answer):
            raise SystemExit("the answer is not the likeliest token of the logits")
        top.append(likeliest)
    np.savez_compressed(
        HERE / "replay.npz",
        names=np.array(list(asked)),
        prompt_lengths=np.array([len(p) for p in prompts], np.uint16),
        answer_lengths=np.array([len(a) for a in answers], np.uint16),
        prompts=np.concatenate(prompts).astype(np.uint16),
        answers=np.concatenate(answers).astype(np.uint16),
        top=np.concatenate(top).astype(np.uint16),
    )
    print(f"{len(asked)} prompts, {sum(map(len, prompts))} tokens; {sum(map(len, answers))} tokens of answers")


if __name__ == "__main__":
    main()
