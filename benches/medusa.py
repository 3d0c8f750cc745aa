"""Medusa heads from a model's own text: what training takes, and what the heads save.

``python -m benches.medusa [--model smollm2-135m] [--heads DIRECTORY] [--tokens 200000] [--prompts 5] [--answer 112]``

Trains heads unless ``--heads`` holds some, prints the seconds of each stage and each head's share of right first
guesses on held-out texts, then answers Spec-Bench prompts (or a few of ours, where ``FARTHING_DATA`` has none)
without drafts and with trees of several sizes, in turn. The texts must be equal token for token. Tokens a pass count
drawn tokens over passes that drew any; speeds are medians over prompts.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import median

import farthing as ft
from farthing.speculative import Medusa, train_medusa

from .speculation import PASSAGES, questions

NODES = (3, 7, 15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--heads", type=Path, default=Path("medusa-heads"))
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--answer", type=int, default=112)
    options = parser.parse_args()
    if not (options.heads / "medusa_lm_head.safetensors").exists():
        done = train_medusa(options.model, options.heads, tokens=options.tokens)
        total = done.generation_seconds + done.state_seconds + done.training_seconds
        print(f"{done.texts} texts, {done.tokens} tokens: written in {done.generation_seconds:.0f} s,")
        print(
            f"states in {done.state_seconds:.0f} s, heads fitted in {done.training_seconds:.0f} s; {total / 60:.1f} min"
        )
        print("first guesses right on held-out texts:", ", ".join(f"{share:.1%}" for share in done.accuracy))
    data = Path(os.environ.get("FARTHING_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if (data / "eval" / "spec_bench_question.jsonl").exists():
        kinds = questions(data, options.prompts)
    else:
        kinds = {"repeat": [f"Repeat this text word for word:\n\n{text}" for text in PASSAGES[: options.prompts]]}
    engines = {"off": ft.LLM(options.model, speculation=None)}
    engines["auto"] = ft.LLM(options.model, speculation=Medusa(options.heads))
    for nodes in NODES:
        engines[f"{nodes} nodes"] = ft.LLM(options.model, speculation=Medusa(options.heads), draft_tokens=nodes)
    params = ft.SamplingParams(max_tokens=options.answer)
    drawn = dict.fromkeys(engines, 0)
    passes = dict.fromkeys(engines, 0)
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for prompt in (prompt for prompts in kinds.values() for prompt in prompts):
        texts = []
        for name, llm in engines.items():
            answer = llm.chat([{"role": "user", "content": prompt}], params)[0]
            texts.append(answer.token_ids)
            prompt_passes = -(-answer.ledger.prompt_tokens // 512)
            drawn[name] += len(answer.token_ids) - 1
            passes[name] += answer.ledger.passes - prompt_passes
            if len(answer.token_ids) > 1:
                speeds[name].append((len(answer.token_ids) - 1) / answer.ledger.decode_seconds)
        assert all(text == texts[0] for text in texts), f"texts differ: {prompt!r}"
    print(f"{'drafts':>9}  tokens a pass  tokens a second")
    for name in engines:
        print(f"{name:>9}  {drawn[name] / max(passes[name], 1):13.2f}  {median(speeds[name]):15.1f}")


if __name__ == "__main__":
    main()
