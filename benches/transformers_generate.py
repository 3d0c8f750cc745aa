"""`ft.hf.accelerate` under transformers' own `generate`, beside torch in bfloat16.

``python -m benches.transformers_generate [--model FILE] [--tokens 64] [--rounds 5] [--threads 2]``

Both are the same weights of a GGUF file in a transformers model in bfloat16, greedy, one prompt, the same settings, by
turns in one process. Accelerated means int4 in groups of 32 with a minimum, the engine's own format. Before anything is
timed the accelerated logits are compared with the engine's, in float32, and those after `restore` with those before.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import farthing as ft  # noqa: E402
import numpy as np  # noqa: E402
import reference  # noqa: E402
import torch  # noqa: E402

from .end_to_end import default_model  # noqa: E402
from .workers import IDS  # noqa: E402

GRID = {"weights": "int4", "group": 32, "symmetric": False}


def check(model: Any) -> None:
    """Prints how far accelerated logits are from the engine's; raises if `restore` does not give back the model."""
    ids, tied = IDS[:64], model.config.tie_word_embeddings
    before = reference.logits(model, ids)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        for activations in ("a16", "auto"):
            report = ft.hf.accelerate(model, **GRID, activations=activations)
            engine = ft.LLM(directory, weights="int4", activations=activations, kv="f32").logits(ids)
            embedding = model.get_input_embeddings().weight
            original = embedding.data
            if tied:  # the engine's embedding is the packed head
                embedding.data = model.lm_head.weight
            distance = np.linalg.norm(reference.logits(model, ids) - engine) / np.linalg.norm(engine)
            embedding.data = original
            ft.hf.restore(model)
            print(f"logits beside the engine's, activations {activations}: {distance:.1e} relative")
    if not np.array_equal(reference.logits(model, ids), before):
        raise SystemExit("restore: the logits differ")
    print(f"restored logits: the same bits\n\n{report}\n")


def main() -> None:
    """Checks, measures by turns and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 512], help="lengths of the prompts")
    arguments = parser.parse_args()
    path = arguments.model or default_model()
    torch.set_num_threads(arguments.threads)
    model = reference.gguf_model(path)
    check(model)
    model = model.to(torch.bfloat16)
    model.set_attn_implementation("sdpa")
    packed = copy.deepcopy(model)
    ft.hf.accelerate(packed, **GRID)
    models = {"torch bf16": model, "accelerated": packed}

    def generate(model: Any, length: int, tokens: int) -> float:
        ids = torch.tensor([IDS[:length]])
        start = perf_counter()
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        seconds = perf_counter() - start
        if answer.shape[1] != length + tokens:
            raise SystemExit(f"got {answer.shape[1] - length} tokens, expected {tokens}")
        return seconds

    print(f"{path.name}, transformers generate, {arguments.threads} threads, medians of {arguments.rounds} rounds")
    print(f"{'seconds':<34}" + "".join(f"{name:>14}" for name in models) + f"{'ratio':>8}")
    for length in arguments.prompts:
        for what, tokens in (("first token", 1), (f"{arguments.tokens} tokens", arguments.tokens)):
            times: dict[str, list[float]] = {name: [] for name in models}
            for turn in range(-1, arguments.rounds):
                for name, each in models.items():
                    seconds = generate(each, length, tokens)
                    if turn >= 0:
                        times[name].append(seconds)
            ratio = median(a / b for a, b in zip(*times.values(), strict=True))
            row = "".join(f"{median(values):>14.3f}" for values in times.values())
            print(f"{f'prompt of {length}, {what}':<34}{row}{ratio:>8.2f}", flush=True)
            if tokens > 1:
                rates = "".join(f"{tokens / median(values):>14.1f}" for values in times.values())
                print(f"{'  tokens per second':<34}{rates}", flush=True)


if __name__ == "__main__":
    main()
