"""`linear_divergence` beside naive torch, TRL's chunked kernel and Liger's chunked loss: time and memory of one step.

``python -m benches.divergence [--rows 256] [--vocabulary 150000] [--width 1024] [--rounds 5] [--dtypes bfloat16]``

A step is the reverse KL of N rows from a teacher with a head of its own, forward and backward, with the head frozen or
trained. Rows are peaked as language models are (the likeliest token has about 0.78). Losses and gradients of every way
are checked against naive torch in float32 first. Rounds run every way once; figures are medians. Memory is the highest
resident set of a step beyond what is resident when it is done (inputs, heads and their gradients); of naive torch also
what it takes before the head's gradient exists. TRL and Liger take part where they are installed
(``pip install --no-deps trl liger-kernel`` and what they import).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from farthing.reasoning import linear_divergence
from torch.nn import functional as F

FILTER = 1e-4
# Tokens beside the favourite that have probability.
OTHERS = 20
# Distances from naive torch in float32, in norm: rounding alone, and with what the filter leaves out.
BOUNDS = {torch.float32: (2e-4, 2e-2), torch.bfloat16: (1e-1, 1e-1)}


@dataclass
class Step:
    """Inputs of a step; gradients go to ``hidden`` and, if it is trained, ``weight``."""

    hidden: torch.Tensor
    weight: torch.Tensor
    teacher: torch.Tensor
    teacher_weight: torch.Tensor
    peaks: list[int] = field(default_factory=list)

    def clear(self) -> None:
        """Forgets gradients."""
        self.hidden.grad = self.weight.grad = None


def inputs(rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> Step:
    """Rows as language models make them: a favourite with 0.78, some other tokens with 0.21, the rest with 0.01.

    The other tokens follow a power law, in which they are common and how likely each is. The teacher's logits of these
    tokens differ by a standard deviation of 1; its head is near the student's.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight = normal(vocabulary, width).mul_(width**-0.5)
    tokens = (vocabulary ** torch.rand(rows, 1 + OTHERS, generator=generator)).long().clamp(max=vocabulary - 1)
    shares = 1.0 / torch.arange(1, OTHERS + 1)
    shares = torch.cat([torch.tensor([0.78]), 0.21 * shares / shares.sum()])
    # The background's logits are normal with deviation |hidden| / sqrt(width); 18.5 puts 0.01 of the mass there.
    wanted = (shares / 0.78).log() + 18.5
    hidden, teacher = torch.empty(rows, width), torch.empty(rows, width)
    for row in range(rows):
        some = weight[tokens[row].unique()]
        targets = wanted[: len(some)][torch.randperm(len(some), generator=generator)]
        for states, logits in ((hidden, targets), (teacher, targets + normal(len(some)))):
            states[row] = torch.linalg.lstsq(some, logits[:, None], driver="gelsd").solution[:, 0]
    teacher_weight = weight + normal(vocabulary, width).mul_(0.02 * width**-0.5)
    return Step(*(x.to(dtype) for x in (hidden, weight, teacher, teacher_weight)))


def naive(step: Step) -> torch.Tensor:
    """What is written without thinking of memory."""
    with torch.no_grad():
        q = F.linear(step.teacher, step.teacher_weight).float().log_softmax(-1)
    logits = F.linear(step.hidden, step.weight)
    # Before the head's gradient comes into being most of the rest is there.
    logits.register_hook(lambda _: step.peaks.append(memory("VmHWM")))
    p = logits.float().log_softmax(-1)
    return F.kl_div(q, p, reduction="sum", log_target=True) / len(step.hidden)


def farthing(threshold: float) -> Callable[[Step], torch.Tensor]:
    """`linear_divergence`."""

    def loss(step: Step) -> torch.Tensor:
        return linear_divergence(step.hidden, step.weight, step.teacher, step.teacher_weight, filter=threshold).loss

    return loss


def trl() -> Callable[[Step], torch.Tensor]:
    """TRL's chunked divergence, as its distillation trainer calls it."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(step: Step) -> torch.Tensor:
        rows, _ = ChunkedDivergenceFunction.apply(
            step.hidden, step.weight, None, step.teacher, step.teacher_weight, None, 1.0
        )
        return rows.mean()

    return loss


def liger() -> Callable[[Step], torch.Tensor]:
    """Liger's chunked loss in torch, its soft part alone."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)

    def loss(step: Step) -> torch.Tensor:
        labels = torch.zeros(len(step.hidden), dtype=torch.long)
        return module(step.hidden, step.weight, step.teacher, step.teacher_weight, labels)

    return loss


def ways() -> dict[str, Callable[[Step], torch.Tensor]]:
    """Everything that can run here."""
    found = {"naive torch": naive, "farthing, exact": farthing(0.0), f"farthing, filter {FILTER:g}": farthing(FILTER)}
    for name, make in (("TRL chunked", trl), ("Liger chunked", liger)):
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name}: left out ({error})")
    return found


def check(name: str, got: torch.Tensor, wanted: torch.Tensor, bound: float) -> float:
    """Refuses to time a wrong result."""
    distance = float((got.float() - wanted.float()).norm() / wanted.float().norm())
    if not distance <= bound:
        raise SystemExit(f"{name}: {distance:.1e} from float32, expected at most {bound:.0e}; no timing")
    return distance


def memory(word: str) -> int:
    """Bytes of that line of this process's status."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(word + ":"))
    return int(line.split()[1]) * 1024


def measured(way: Callable[[Step], torch.Tensor], step: Step) -> tuple[float, int]:
    """Seconds of a step and bytes that it takes for a while."""
    step.clear()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    step.peaks.clear()
    before, start = memory("VmRSS"), perf_counter()
    way(step).backward()
    seconds, most = perf_counter() - start, memory("VmHWM")
    ctypes.CDLL(None).malloc_trim(0)
    return seconds, max(most - memory("VmRSS"), *(peak - before for peak in step.peaks), 0)


def table(step: Step, trained: bool, rounds: int) -> None:
    """Checks and times every way."""
    step.hidden.requires_grad_()
    step.weight.requires_grad_(trained)
    dtype = step.hidden.dtype
    every = ways()
    exact = Step(*(x.detach().float() for x in vars(step).values() if isinstance(x, torch.Tensor)))
    exact.hidden.requires_grad_()
    exact.weight.requires_grad_(trained)
    wanted = naive(exact)
    wanted.backward()
    reference = [wanted.detach().reshape(1), exact.hidden.grad, *([exact.weight.grad] if trained else [])]
    del exact, wanted
    for name, way in every.items():
        step.clear()
        loss = way(step)
        loss.backward()
        got = [loss.detach().reshape(1), step.hidden.grad, *([step.weight.grad] if trained else [])]
        bound = BOUNDS[dtype]["filter" in name]
        # Liger makes log-probabilities in the type of its input.
        bound = 1.0 if name.startswith("Liger") and dtype == torch.bfloat16 else bound
        far = [
            check(f"{name}, {what}", x, y, bound)
            for what, x, y in zip(("loss", "states", "head"), got, reference, strict=False)
        ]
        print(f"  {name:22} loss {loss.item():.6f}   distances " + "  ".join(f"{x:.1e}" for x in far))
        del loss, got
    sides = (step.hidden, step.weight, step.teacher, step.teacher_weight)
    found = linear_divergence(*sides, filter=FILTER)
    slopes = [torch.autograd.grad(x.loss, step.hidden)[0].float() for x in (found, linear_divergence(*sides))]
    share = float(((slopes[0] - slopes[1]).norm(dim=1) / found.bound.clamp(min=1e-30)).max())
    print(f"  filter keeps {found.columns:.1%} of the columns; it moves rows by up to {share:.0%} of their bound")
    del reference, found, slopes
    figures = {name: [] for name in every}
    for _ in range(rounds):
        for name, way in every.items():
            figures[name].append(measured(way, step))
    base, base_bytes = (median(column) for column in zip(*figures["naive torch"], strict=True))
    for name, runs in figures.items():
        seconds, extra = (median(column) for column in zip(*runs, strict=True))
        time, space = (
            f"{seconds * 1e3:7.0f} ms  {seconds / base:5.2f}x",
            f"{extra / 1e6:7.0f} MB  {extra / base_bytes:5.2f}x",
        )
        print(f"  {name:22} {time}   {space}", flush=True)
    step.clear()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--heads", nargs="+", default=["frozen", "trained"], choices=["frozen", "trained"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in options.dtypes:
        step = inputs(options.rows, options.vocabulary, options.width, getattr(torch, dtype))
        with torch.no_grad():
            top = float(F.linear(step.hidden, step.weight).float().softmax(-1).amax(-1).mean())
        for head in options.heads:
            print(
                f"{dtype}, head {head}: N={options.rows} V={options.vocabulary} H={options.width}, "
                f"{options.threads} threads, likeliest token {top:.2f}",
                flush=True,
            )
            table(step, head == "trained", options.rounds)


if __name__ == "__main__":
    main()
