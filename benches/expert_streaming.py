"""Experts larger than memory: tokens a second from disk, beside a plain reader in the same run.

``python -m benches.expert_streaming [--model olmoe-1b-7b] [--share 0.5] [--decode 48] [--rounds 5]``

A model with random weights keeps a share of its experts in memory; the rest comes from disk while it decodes, one
sequence. Random routing is close to uniform: the hardest case for a memory of experts. In each round the plain reader
then reads as many ranges of an expert's length, at random places of the model file, with as many threads, in the same
pieces, by ``preadv`` through the system's cache, which holds none of them (``posix_fadvise``). The ratio is bytes a
second against bytes a second: what decoding leaves of the disk. Tokens must equal those of the resident model before
anything is timed. ``/proc/self/io`` must show that the disk was read.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import farthing as ft
from farthing.ledger import size

from .moe_models import MODELS, metadata, tensors
from .random_gguf import made

READERS = 4  # as many as the engine has
PIECE = 2 << 20  # as the engine reads


def disk_bytes() -> int:
    """Bytes that this process has had read from disks."""
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def drop(path: Path) -> None:
    """Takes a file out of the system's cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(path: Path, length: int, count: int) -> float:
    """Bytes a second of a reader of ``count`` ranges of ``length`` bytes."""
    drop(path)
    places = random.sample(range(path.stat().st_size // length), count)
    pieces = [(place * length + at, min(PIECE, length - at)) for place in places for at in range(0, length, PIECE)]
    buffers = [bytearray(PIECE) for _ in range(READERS)]
    with path.open("rb") as file, ThreadPoolExecutor(READERS) as pool:

        def read(reader: int) -> int:
            view = memoryview(buffers[reader])
            return sum(os.preadv(file.fileno(), [view[:n]], at) for at, n in pieces[reader::READERS])

        begun = time.perf_counter()
        total = sum(pool.map(read, range(READERS)))
        seconds = time.perf_counter() - begun
    drop(path)
    if total != length * count:
        raise SystemExit(f"the plain reader got {total} bytes instead of {length * count}")
    return total / seconds


def main() -> None:
    """Makes the model, compares tokens, measures."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="olmoe-1b-7b", choices=list(MODELS))
    parser.add_argument("--format", default="Q4_0", choices=["Q4_0", "Q4_K"])
    parser.add_argument("--share", type=float, default=0.5, help="of the experts that stay in memory")
    parser.add_argument("--decode", type=int, default=48, help="tokens of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--activations", default="auto", choices=["auto", "a8", "a16"])
    parser.add_argument("--cache", type=Path, default=home / "farthing" / "models")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    arguments = parser.parse_args()
    shape = MODELS[arguments.model]
    path = arguments.cache / f"{arguments.model}-{arguments.format}.gguf"
    model = made(path, metadata(shape), tensors(shape, arguments.format))
    options = {"threads": arguments.threads, "activations": arguments.activations, "context": 2048}
    # Drawn evenly from the vocabulary: a greedy random model soon repeats one token and its experts.
    params = ft.SamplingParams(max_tokens=arguments.decode, temperature=100.0, seed=0, ignore_eos=True)
    prompts = [[7 + 3 * turn, 11, 200 + turn] for turn in range(arguments.rounds + 2)]

    resident = ft.LLM(model, **options)
    experts = sum(row.nbytes for row in resident.explain() if row.role.startswith("expert"))
    expected = resident.generate(prompts[0], params)[0]
    rate = expected.ledger.decode_rate
    print(f"all resident: {rate:.1f} tok/s; experts {size(experts)}", flush=True)
    del resident

    begun = time.perf_counter()
    llm = ft.LLM(model, expert_memory=int(arguments.share * experts), **options)
    print(
        f"loaded with {size(arguments.share * experts)} for experts in {time.perf_counter() - begun:.1f} s", flush=True
    )
    drop(path)
    if llm.generate(prompts[0], params)[0].token_ids != expected.token_ids:
        raise SystemExit("other tokens than the resident model's: no timing")
    llm.generate(prompts[1], params)  # the memory is full
    length, rounds = experts // (shape.experts * shape.layers), []
    print("tok/s   fetched  hit rate  guesses right   disk        plain reader  ratio")
    for prompt in prompts[2:]:
        before, disk = llm.ledger, disk_bytes()
        llm.generate(prompt, params)
        after, disk = llm.ledger, disk_bytes() - disk
        seconds = after.decode_seconds + after.prefill_seconds - before.decode_seconds - before.prefill_seconds
        fetched = after.expert_bytes - before.expert_bytes
        hits, misses = after.expert_hits - before.expert_hits, after.expert_misses - before.expert_misses
        guesses = after.expert_guesses - before.expert_guesses
        right = after.expert_right_guesses - before.expert_right_guesses
        reader = plain(path, length, fetched // length)
        found = {
            "tokens_per_second": arguments.decode / seconds,
            "fetched": fetched,
            "disk": disk,
            "hit_rate": hits / (hits + misses),
            "guesses": guesses,
            "right_guesses": right,
            "bytes_per_second": fetched / seconds,
            "plain_reader": reader,
            "ratio": fetched / seconds / reader,
        }
        rounds.append(found)
        print(
            f"{found['tokens_per_second']:5.2f}   {size(fetched):>7}  {found['hit_rate']:8.0%}  "
            f"{right:6} / {guesses:<6} {size(fetched / seconds):>7}/s  {size(reader):>9}/s  {found['ratio']:5.2f}",
            flush=True,
        )
        if disk < fetched // 2:
            raise SystemExit(f"only {size(disk)} of {size(fetched)} came from the disk: nothing was measured")
    print(
        f"median: {median(r['tokens_per_second'] for r in rounds):.2f} tok/s, "
        f"ratio to the plain reader {median(r['ratio'] for r in rounds):.2f}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
