"""What packed weights and activations cost in accuracy, beside llama.cpp on the same files.

``python -m benches.accuracy [--models DIRECTORY] [--tokens 2048] [--json FILE]``

The exact model is transformers in float32 on the file's own dequantised weights, so that all error is arithmetic:
rounding of activations, keys and values. The text is the head of WikiText-2's test set, one window. KL is from the
exact distribution, in nats, the mean over positions; top-1 the share of positions with the same likeliest token.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import farthing as ft  # noqa: E402
import reference  # noqa: E402

from .end_to_end import default_model  # noqa: E402
from .llama_cpp_library import LlamaCpp, PeerMissingError  # noqa: E402

DATA = Path(os.environ.get("FARTHING_DATA", ROOT.parent / "shared" / "data"))
LARGER = [
    "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    "gemma-3-270m-q4_k_m.gguf",
    "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
]
POLICIES = {
    "farthing, default": {},
    "farthing, a8": {"activations": "a8"},
    "farthing, a16": {"activations": "a16"},
    "farthing, f32": {"weights": "f32"},
}
HEADER = f"{'':<20}{'perplexity':>12}{'change':>10}{'KL':>11}{'top-1':>9}{'max-abs':>9}"


def report(name: str, agreement: reference.Agreement) -> dict[str, float]:
    """Prints one row and returns it."""
    row = {
        "perplexity": agreement.perplexity,
        "change": agreement.perplexity_change,
        "kl": agreement.kl,
        "top1": agreement.top1,
        "max_abs": agreement.max_abs,
    }
    print(
        f"{name:<20}{row['perplexity']:>12.4f}{row['change']:>+10.3%}{row['kl']:>11.2e}{row['top1']:>9.2%}{row['max_abs']:>9.4f}",
        flush=True,
    )
    return row


def compare(path: Path, text: str, tokens: int, threads: int) -> dict[str, dict[str, float]]:
    """Every policy and llama.cpp on one file."""
    llm = ft.LLM(path, threads=threads, context=tokens, max_sequences=1)
    # Gemma is lost without its begin token; the others were measured without one.
    ids = llm.tokenizer.encode(text, add_special_tokens="gemma" in path.name.lower())[:tokens]
    del llm
    exact = reference.logits(reference.gguf_model(path), ids)
    gc.collect()
    print(f"\n{path.name}, {len(ids)} tokens of WikiText-2\n{HEADER}")
    rows = {"transformers, f32": report("transformers, f32", reference.Agreement(exact, exact, ids))}
    for name, options in POLICIES.items():
        llm = ft.LLM(path, threads=threads, context=tokens, max_sequences=1, **options)
        rows[name] = report(name, reference.Agreement(exact, llm.logits(ids), ids))
        del llm
    try:
        peer = LlamaCpp(path, threads=threads, context=tokens)
    except PeerMissingError as error:
        print(f"skipped llama.cpp: {error}")
    else:
        rows["llama.cpp"] = report("llama.cpp", reference.Agreement(exact, peer.logits(ids), ids))
    return rows


def main() -> None:
    """Parses the command line and prints a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=Path, default=os.environ.get("FARTHING_MODELS"), help="directory of larger models"
    )
    parser.add_argument("--only", default="", help="files whose name has this in it")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    wikitext = DATA / "eval" / "wikitext2_test.txt"
    if not wikitext.exists():
        raise SystemExit(f"needs {wikitext} (or FARTHING_DATA)")
    text = wikitext.read_text(encoding="utf-8")[: 16 * arguments.tokens]
    figures = {}
    paths = [default_model(), *(Path(arguments.models or "absent", name) for name in LARGER)]
    for path in paths:
        if arguments.only not in path.name:
            continue
        if path.exists():
            figures[path.name] = compare(path, text, arguments.tokens, arguments.threads)
        else:
            print(f"\nskipped {path.name}: not in --models or FARTHING_MODELS")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
