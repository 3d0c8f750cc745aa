"""The books: what an answer, and an engine's whole life, really cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from . import _core
from .machine import measured
from .tables import html_table, text_table

__all__ = ["EngineLedger", "Ledger"]

PRICES = ("input_per_million", "output_per_million", "cpu_hour")


class _Table:
    """A ledger prints as a table: in the terminal, in a notebook, and in rich."""

    def _rows(self) -> list[tuple[str, str]]:
        raise NotImplementedError

    def __str__(self) -> str:
        return text_table(self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._rows(), caption="ledger")

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title="ledger", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="dim")
        table.add_column(justify="right")
        for row in self._rows():
            table.add_row(*row)
        return table


@dataclass(frozen=True)
class Ledger(_Table):
    """Cost of one request.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cached_tokens: prompt tokens whose keys and values were found ready.
        thinking_tokens: drawn tokens inside a thinking span.
        answer_tokens: drawn tokens outside it, markers and the end token included.
        forced_tokens: generated tokens that were dictated, not drawn.
        probe_tokens: tokens computed only to look at the model's state.
        passes: forward passes the request took part in.
        drafted: tokens a drafter proposed.
        accepted: proposed tokens that were kept.
        preemptions: times the request lost its pages and computed them again.
        weight_bytes: bytes of weights read, each pass divided by the sequences that shared it.
        kv_bytes: bytes of keys and values read and written.
        queue_seconds: from submission to the first pass.
        prefill_seconds: from the first pass to the first token.
        decode_seconds: from the first token to the last.
        cpu_seconds: thread-seconds, each pass divided by the sequences that shared it.
    """

    prompt_tokens: int
    cached_tokens: int
    thinking_tokens: int
    answer_tokens: int
    forced_tokens: int
    probe_tokens: int
    passes: int
    drafted: int
    accepted: int
    preemptions: int
    weight_bytes: float
    kv_bytes: int
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    cpu_seconds: float

    @property
    def output_tokens(self) -> int:
        """Generated tokens: thinking, dictated ones and answer."""
        return self.thinking_tokens + self.forced_tokens + self.answer_tokens

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens computed per second; None when nothing was timed."""
        return _rate(self.prompt_tokens - self.cached_tokens, self.prefill_seconds)

    @property
    def decode_rate(self) -> float | None:
        """Generated tokens per second after the first; None when there was only one."""
        return _rate(self.output_tokens - 1, self.decode_seconds)

    @property
    def bandwidth(self) -> float | None:
        """Bytes of weights, keys and values read per second of prefill and decode."""
        return _rate(self.weight_bytes + self.kv_bytes, self.prefill_seconds + self.decode_seconds)

    def cost(self, prices: Mapping[str, float]) -> float:
        """What the request cost, in the currency of ``prices``.

        Args:
            prices: any of ``input_per_million`` and ``output_per_million`` (tokens) and ``cpu_hour`` (one CPU).

        Raises:
            ValueError: an unknown price, or one that is no finite number ≥ 0.
        """
        return _core.cost(self.prompt_tokens, self.output_tokens, self.cpu_seconds, **checked_prices(prices))

    def _rows(self) -> list[tuple[str, str]]:
        prompt = f"{self.prompt_tokens} tokens" + (f" ({self.cached_tokens} cached)" if self.cached_tokens else "")
        rows = [("prompt", prompt)]
        if self.thinking_tokens:
            rows.append(("thinking", f"{self.thinking_tokens} tokens"))
        rows.append(("answer", f"{self.answer_tokens} tokens"))
        optional = {
            "forced": self.forced_tokens,
            "probes": self.probe_tokens,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "preemptions": self.preemptions,
        }
        rows += [(name, str(count)) for name, count in optional.items() if count]
        rows += [
            ("passes", str(self.passes)),
            ("weights read", size(self.weight_bytes)),
            ("keys and values", size(self.kv_bytes)),
            ("queue", seconds(self.queue_seconds)),
            ("prefill", seconds(self.prefill_seconds) + _per_second(self.prefill_rate)),
            ("decode", seconds(self.decode_seconds) + _per_second(self.decode_rate)),
            ("processor", seconds(self.cpu_seconds)),
            ("memory read", _against_limit(self.bandwidth)),
        ]
        return rows


@dataclass(frozen=True)
class EngineLedger(_Table):
    """Cost of everything an engine has done.

    Attributes:
        requests: requests finished, cancelled ones included.
        passes: forward passes.
        rows: tokens that went through the blocks.
        drawn: tokens drawn.
        drafted: tokens proposed by drafters and verified.
        accepted: of which so many were kept.
        preemptions: preemptions for lack of pages.
        weight_bytes: bytes of weights read.
        kv_bytes: bytes of keys and values read and written.
        prefill_seconds: seconds in passes that held prompt tokens.
        decode_seconds: seconds in passes without.
        decode_bytes: bytes of weights, keys and values that those passes read.
        expert_hits: experts that were in memory when a step needed them, under ``expert_memory``.
        expert_misses: experts that had to be fetched from disk.
        expert_bytes: bytes of experts fetched from disk.
        expert_evictions: experts that left memory.
        expert_guesses: experts fetched because the next layer's router might choose them.
        expert_right_guesses: of which so many were needed before they left.
        expert_choices: experts that routers chose, under ``expert_skip`` or ``expert_cache_margin``, which are lossy.
        expert_skipped: of which so many were left out.
        expert_substituted: of which so many gave way to experts in memory.
    """

    requests: int
    passes: int
    rows: int
    drawn: int
    drafted: int
    accepted: int
    preemptions: int
    weight_bytes: int
    kv_bytes: int
    prefill_seconds: float
    decode_seconds: float
    decode_bytes: int
    expert_hits: int
    expert_misses: int
    expert_bytes: int
    expert_evictions: int
    expert_guesses: int
    expert_right_guesses: int
    expert_choices: int
    expert_skipped: int
    expert_substituted: int

    @property
    def expert_hit_rate(self) -> float | None:
        """Share of the experts a step needed that were in memory; None where all stay there."""
        return _rate(self.expert_hits, self.expert_hits + self.expert_misses)

    @property
    def decode_bandwidth(self) -> float | None:
        """Bytes per second of the decode passes; None before the first."""
        return _rate(self.decode_bytes, self.decode_seconds)

    def _rows(self) -> list[tuple[str, str]]:
        rows = [
            ("requests", str(self.requests)),
            ("passes", str(self.passes)),
            ("tokens computed", str(self.rows)),
            ("tokens drawn", str(self.drawn)),
            ("preemptions", str(self.preemptions)),
            ("weights read", size(self.weight_bytes)),
            ("keys and values", size(self.kv_bytes)),
            ("prefill", seconds(self.prefill_seconds)),
            ("decode", seconds(self.decode_seconds)),
            ("memory read in decode", _against_limit(self.decode_bandwidth)),
        ]
        if self.expert_misses:
            rows += [
                ("experts found in memory", f"{self.expert_hit_rate or 0:.0%}"),
                ("experts fetched", size(self.expert_bytes)),
            ]
        departures = {"left out": self.expert_skipped, "substituted": self.expert_substituted}
        rows += [
            (f"experts {what} (lossy)", f"{count} of {self.expert_choices}")
            for what, count in departures.items()
            if count
        ]
        return rows


def from_core(kind: type[Any], core: Any) -> Any:
    """The dataclass ``kind`` from the core's record of the same fields."""
    return kind(**{field.name: getattr(core, field.name) for field in fields(kind)})


def size(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def seconds(value: float) -> str:
    """Seconds with a unit that fits."""
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def _rate(count: float, duration: float) -> float | None:
    return count / duration if count > 0 and duration > 0 else None


def _against_limit(bandwidth: float | None) -> str:
    """A bandwidth, and its share of the machine's where `farthing.machine.limits` was asked before."""
    if bandwidth is None:
        return "–"
    limits = measured()
    return f"{size(bandwidth)}/s" + (f", {bandwidth / limits.bandwidth:.0%} of the limit" if limits else "")


def _per_second(rate: float | None) -> str:
    return "" if rate is None else f", {rate:.1f} tok/s"


def checked_prices(prices: Mapping[str, float]) -> dict[str, float]:
    """All prices, 0 where none is given; ValueError for an unknown name or a number that is no price."""
    for name, price in prices.items():
        if name not in PRICES:
            raise ValueError(f"prices: got {name!r}, expected any of {', '.join(PRICES)}")
        if isinstance(price, bool) or not isinstance(price, (int, float)) or not 0 <= price < float("inf"):
            raise ValueError(f"prices: {name}: got {price!r}, expected a finite number ≥ 0")
    return {name: float(prices.get(name, 0.0)) for name in PRICES}
