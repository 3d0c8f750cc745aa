"""Routing beside torch's softmax and topk: E experts, K for each token, weights normalised.

``python -m benches.router [--experts 128] [--top-k 8] [--rounds 200]``
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import farthing as ft
import torch

ROWS = (1, 64, 512)


def main() -> None:
    """Measures both by turns, from Python, and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2, help="of torch; farthing uses one for so few rows")
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    experts, top_k, hidden = arguments.experts, arguments.top_k, arguments.hidden
    spec = ft.moe.RouterSpec(experts, top_k, norm_topk_prob=True)
    weight = torch.randn(experts, hidden) * hidden**-0.5
    packed = ft.quantize(weight, "f32")

    def reference(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = torch.topk(torch.softmax(logits, -1), top_k, -1)
        weights /= weights.sum(-1, keepdim=True)
        return ids, weights

    def ours(x: torch.Tensor, matrix: ft.PackedMatrix | None) -> tuple[torch.Tensor, torch.Tensor]:
        routing = ft.moe.route(x, spec, matrix)
        return routing.ids, routing.weights

    print(f"{experts} experts, {top_k} for each token, {hidden} inputs, float32; medians in µs")
    print(f"{'rows':>5}{'from':>8}{'farthing':>10}{'torch':>8}{'ratio':>8}")
    for rows in ROWS:
        x = torch.randn(rows, hidden)
        logits = x @ weight.T
        ways: dict[str, tuple[Callable, Callable]] = {
            "logits": (lambda logits=logits: ours(logits, None), lambda logits=logits: reference(logits)),
            "x": (lambda x=x: ours(x, packed), lambda x=x: reference(x @ weight.T)),
        }
        for name, pair in ways.items():
            (ids, got), (wanted_ids, wanted) = pair[0](), pair[1]()
            order, wanted_order = ids.sort(-1).indices, wanted_ids.sort(-1).indices
            same = torch.equal(ids.gather(-1, order), wanted_ids.gather(-1, wanted_order))
            close = (got.gather(-1, order) - wanted.gather(-1, wanted_order)).abs().max() <= 1e-5
            if not same or not close:
                raise SystemExit(f"{rows} rows from {name}: results differ, no timing")
            times: tuple[list[float], list[float]] = ([], [])
            for turn in range(-10, arguments.rounds):
                for way, taken in zip(pair, times, strict=True):
                    start = perf_counter()
                    way()
                    if turn >= 0:
                        taken.append(perf_counter() - start)
            first, second = (1e6 * median(taken) for taken in times)
            print(f"{rows:>5}{name:>8}{first:>10.1f}{second:>8.1f}{first / second:>8.2f}")


if __name__ == "__main__":
    main()
