"""Drafters beside their peers, from Python: time of a draft, time to take tokens in, memory.

``python -m benches.drafters [--steps 200]``; what the Python call itself costs is in every row. The core alone:
``cargo bench -p farthing --bench drafters``. Peers: transformers' prompt lookup, vLLM's numba n-gram and
arctic-inference's suffix cache; those that are not installed are named and left out. Each step asks all of them in turn
about the same text: the recorded prompts and answers one behind the other, and again where that is too short.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import numpy as np
import torch
from farthing.speculative import NGram, Suffix, SuffixDecodingCache, SuffixStore, TokenRecycling
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from benches.replay import Recording, corpus, replay_all

try:
    from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens as numba_ngram
except ImportError:
    numba_ngram = None
try:
    from arctic_inference.suffix_decoding import SuffixDecodingCache as ArcticCache
except ImportError:
    ArcticCache = None

CONTEXTS = (512, 2048, 8192, 32768)
DEPTH, MOST = 64, 15
BUDGETS = (3, 7, 15)


def timed(call: Callable) -> tuple[object, float]:
    start = perf_counter()
    result = call()
    return result, 1e6 * (perf_counter() - start)


def ngrams(text: np.ndarray, steps: int) -> None:
    """A draft behind one more token, index included."""
    print("n-gram: µs a step (draft and take in one token), medians, contexts of", *CONTEXTS)
    rows: dict[str, list[float]] = {}
    for context in CONTEXTS:
        tokens = np.resize(text, context + steps)
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        lookup = PromptLookupCandidateGenerator(num_output_tokens=10, max_matching_ngram_size=2, max_length=1 << 20)
        ours = {"transformers": NGram("transformers"), "vllm": NGram("vllm", min_n=2, max_n=5, max_tokens=5)}
        times: dict[str, list[float]] = {}
        for drafter in ours.values():
            drafter.begin(tokens[:context])
            drafter.draft(10)
        for end in range(context + 1, context + steps):
            drafts = {}
            for mode, drafter in ours.items():
                token = tokens[end - 1 : end]

                def step(drafter: NGram = drafter, token: np.ndarray = token) -> list[int]:
                    drafter.observe(token)
                    return drafter.draft(10).token_ids

                drafts[mode], taken = timed(step)
                times.setdefault(f"farthing, {mode}'s", []).append(taken)
            (found, _), taken = timed(lambda ids=ids[:, :end], lookup=lookup: lookup.get_candidates(ids))
            times.setdefault("transformers", []).append(taken)
            if found[0, end:].tolist() != drafts["transformers"]:
                raise SystemExit(f"transformers drafts otherwise behind {end} tokens, no timing")
            if numba_ngram is not None:
                if end == context + 1:
                    numba_ngram(tokens[:64], 2, 5, 1 << 20, 5)
                found, taken = timed(lambda tokens=tokens, end=end: numba_ngram(tokens[:end], 2, 5, 1 << 20, 5))
                times.setdefault("vLLM (numba)", []).append(taken)
                if found.tolist() != drafts["vllm"]:
                    raise SystemExit(f"vLLM drafts otherwise behind {end} tokens, no timing")
        for name, taken in times.items():
            rows.setdefault(name, []).append(median(taken))
    for name, medians in rows.items():
        print(f"  {name:<28}" + "".join(f"{value:>9.1f}" for value in medians))
    if numba_ngram is None:
        print("  vLLM is not installed: left out")


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def suffixes(recordings: list[Recording]) -> None:
    """All recordings twice through each cache, step by step; quality, times, memory."""
    makers = {"farthing": SuffixDecodingCache} | ({"arctic-inference": ArcticCache} if ArcticCache else {})
    # A few more caches of each, to see their memory beside the allocator's own.
    held, tokens = {}, sum(len(r.prompt) + len(r.answer) for r in recordings)
    for name, make in makers.items():
        before, kept = resident(), []
        for _ in range(8):
            cache = make(DEPTH, -1)
            cache.start_request("all", list(chain.from_iterable(r.prompt + r.answer for r in recordings)))
            kept.append(cache)
        held[name] = (resident() - before) / (8 * tokens)
        del kept
    caches = {name: make(DEPTH, -1) for name, make in makers.items()}
    speculated: dict[str, list[float]] = {name: [] for name in caches}
    added: dict[str, list[float]] = {name: [] for name in caches}
    started: dict[str, float] = dict.fromkeys(caches, 0.0)
    passes: dict[str, list[tuple[int, int, int]]] = {name: [] for name in caches}
    for turn in range(2):
        for index, recording in enumerate(recordings):
            for name, cache in caches.items():
                request = (turn, index)
                prompt = np.array(recording.prompt, np.int32)
                _, taken = timed(lambda c=cache, r=request, p=prompt: c.start_request(r, p))
                started[name] += taken
                text, answer, at = list(recording.prompt), recording.answer, 0
                while at < len(answer):
                    context = np.array(text[-DEPTH:], np.int32)
                    draft, taken = timed(lambda c=cache, r=request, x=context: c.speculate(r, x, max_spec_tokens=MOST))
                    speculated[name].append(taken)
                    accepted = 0
                    for token, expected in zip(draft.token_ids, answer[at:], strict=False):
                        if token != expected:
                            break
                        accepted += 1
                    after = min(at + accepted + 1, len(answer))
                    piece = np.array(answer[at:after], np.int32)
                    _, taken = timed(lambda c=cache, r=request, p=piece: c.add_active_response(r, p))
                    added[name].append(taken / len(piece))
                    passes[name].append((turn, after - at, len(draft.token_ids)))
                    text += answer[at:after]
                    at = after
                cache.stop_request(request)
    prompts = 2 * sum(len(r.prompt) for r in recordings)
    print("\nsuffix cache: depth 64, at most 15 tokens, all recordings twice; µs, times by turns")
    print(
        f"  {'':<20}{'speculate':>10}{'p99':>8}{'add/token':>11}{'prompt/token':>14}"
        f"{'B/token':>9}{'tok/pass':>10}{'seen':>7}"
    )
    for name in caches:
        late = quantiles(speculated[name], n=100)[98]
        rate = [
            sum(tokens for t, tokens, _ in passes[name] if t == turn) / sum(t == turn for t, _, _ in passes[name])
            for turn in range(2)
        ]
        row = (
            f"{median(speculated[name]):>10.1f}{late:>8.1f}{median(added[name]):>11.2f}{started[name] / prompts:>14.2f}"
        )
        print(f"  {name:<20}{row}{held[name]:>9.0f}{rate[0]:>10.2f}{rate[1]:>7.2f}")
    if ArcticCache is None:
        print("  arctic-inference is not installed: left out")


def qualities(recordings: list[Recording]) -> None:
    """Tokens a pass of each drafter on the recordings."""
    store = SuffixStore()
    drafters = {
        "n-gram (transformers)": NGram("transformers"),
        "n-gram (vllm, 2 to 5)": NGram("vllm", min_n=2, max_n=5, max_tokens=15),
        "suffix": Suffix(),
        "suffix, trees": Suffix(tree=True),
        "suffix with a store": Suffix(store),
        "the same, answers seen": Suffix(store),
        "token recycling": TokenRecycling(),
    }
    print("\ntokens a pass (accepted of drafted) on the recordings, most tokens drafted")
    print(f"  {'':<28}" + "".join(f"{budget:>14}" for budget in BUDGETS))
    for name, drafter in drafters.items():
        counts = [replay_all(drafter, recordings, budget)["all"] for budget in BUDGETS]
        cells = (f"{count.per_pass:.2f} ({count.rate:.2f})" for count in counts)
        print(f"  {name:<28}" + "".join(f"{cell:>14}" for cell in cells))


def main() -> None:
    """Prints the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="drafts for each context")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recordings = corpus()
    ngrams(np.array(list(chain.from_iterable(r.prompt + r.answer for r in recordings)), np.int32), arguments.steps)
    suffixes(recordings)
    qualities(recordings)


if __name__ == "__main__":
    main()
