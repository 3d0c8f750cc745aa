"""What a model will need and how fast it can be here, before it is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass

from . import _core
from .explanation import Explanation
from .ledger import size
from .machine import Limits, limits
from .names import locate
from .sizes import byte_count
from .tables import html_table, text_table

__all__ = ["Plan", "plan"]


# Of the probed bandwidth; models from 0.1 to 12 G parameters, dense and with experts, decoded at 75 to 90 %.
REACHED = 0.85


@dataclass(frozen=True)
class Plan:
    """Predictions from a model's headers and this machine's measured limits.

    Attributes:
        family: the architecture.
        context: longest sequence the model was made for.
        parameters: weights of its matrices.
        active_parameters: of which one token is multiplied with (its experts, and no embedding that is not the head).
        file_bytes: bytes of its files.
        resident_bytes: bytes of weights in memory, at most.
        disk_bytes: bytes of packed experts on disk, under ``expert_memory``; those in memory are copies.
        bytes_per_token: bytes of weights one decoded token reads when it is alone in its pass.
        disk_bytes_per_token: of which so many have to be fetched from disk first, if tokens go to all experts alike;
            real routers have favourites, which stay in memory.
        kv_bytes_per_token: bytes of keys and values one token of context takes.
        state_bytes_per_sequence: bytes of the states that a sequence keeps however long it is (convolutions, say).
        operations_per_token: multiplications and additions of one prompt token.
        limits: what the machine can do.
        decode_rate: tokens per second at the bandwidth limit, at an empty context.
        expected_rate: what decoding reaches of it; experts have to be chosen before they are read. Both rates are those
            of weights in memory: fetching experts takes ``disk_bytes_per_token`` over the disk's rate more.
        prompt_rate: prompt tokens per second at the int8 limit; None for weights that are not integers.
        matrices: how every matrix would be packed.
    """

    family: str
    context: int
    parameters: int
    active_parameters: int
    file_bytes: int
    resident_bytes: int
    disk_bytes: int
    bytes_per_token: int
    disk_bytes_per_token: int
    kv_bytes_per_token: int
    state_bytes_per_sequence: int
    operations_per_token: int
    limits: Limits
    decode_rate: float
    expected_rate: float
    prompt_rate: float | None
    matrices: Explanation

    def _rows(self) -> list[tuple[str, str]]:
        limit = self.limits
        rows = [
            ("family", self.family),
            ("context", f"{self.context} tokens"),
            ("parameters", f"{self.parameters / 1e9:.3g} G, {self.active_parameters / 1e9:.3g} G for a token"),
            ("files", size(self.file_bytes)),
            ("weights in memory", size(self.resident_bytes)),
            ("weights read per token", size(self.bytes_per_token)),
            ("keys and values per token", size(self.kv_bytes_per_token)),
            ("keys and values of a full context", size(self.kv_bytes_per_token * self.context)),
            ("states of a sequence", size(self.state_bytes_per_sequence)),
            ("operations per prompt token", f"{self.operations_per_token / 1e9:.3g} G"),
            ("memory bandwidth, measured", f"{size(limit.bandwidth)}/s ({limit.threads} threads)"),
            ("int8 rate, measured", f"{limit.int8_rate / 1e12:.2f} TOP/s"),
            ("decode, at most", f"{self.decode_rate:.0f} tok/s"),
            ("decode, expected", f"{self.expected_rate:.0f} tok/s"),
        ]
        if self.disk_bytes:
            at = next(index for index, row in enumerate(rows) if row[0] == "weights read per token")
            rows[at:at] = [("experts on disk", size(self.disk_bytes))]
            rows[at + 2 : at + 2] = [("fetched from disk per token, even routing", size(self.disk_bytes_per_token))]
        if self.prompt_rate is not None:
            rows.append(("prompt, at most", f"{self.prompt_rate:.0f} tok/s"))
        return rows

    def __str__(self) -> str:
        return text_table(self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._rows(), caption="plan")


def plan(
    model: str | os.PathLike[str] = "smollm2-135m",
    *,
    weights: str = "auto",
    activations: str = "auto",
    kv: str = "auto",
    threads: int | None = None,
    expert_memory: int | str | None = None,
) -> Plan:
    """Reads the headers of ``model``, measures this machine for a moment, and predicts.

    Args:
        model: and the others as in `farthing.LLM`.
        weights: precision of the weights.
        activations: what they meet.
        kv: precision of keys and values.
        threads: that will compute.
        expert_memory: most bytes of a mixture's experts in memory.

    Raises:
        The same errors as `farthing.LLM`.
    """
    path = locate(model)
    budget = None if expert_memory is None else byte_count("expert_memory", expert_memory)
    core = _core.plan(os.fspath(path), weights=weights, activations=activations, kv=kv, expert_memory=budget)
    limit, matrices = limits(threads), Explanation.of(core.matrices, core.resident_bytes)
    return Plan(
        family=core.family,
        context=core.context,
        parameters=core.parameters[0],
        active_parameters=core.parameters[1],
        file_bytes=core.file_bytes,
        resident_bytes=core.resident_bytes,
        disk_bytes=core.disk_bytes,
        bytes_per_token=core.bytes_per_token,
        disk_bytes_per_token=core.disk_bytes_per_token,
        kv_bytes_per_token=core.kv_bytes_per_token,
        state_bytes_per_sequence=core.state_bytes_per_sequence,
        operations_per_token=core.operations_per_token,
        limits=limit,
        decode_rate=limit.bandwidth / core.bytes_per_token,
        expected_rate=REACHED * limit.bandwidth / core.bytes_per_token,
        prompt_rate=_prompt_rate(matrices, limit),
        matrices=matrices,
    )


def _prompt_rate(matrices: Explanation, limit: Limits) -> float | None:
    """At the int8 limit, routers left out; 15-bit activations are two 8-bit planes, so they cost twice."""
    passes = {"a8": 1, "a16": 2}
    routers = ("router", "shared_router")
    blocks = [matrix for matrix in matrices if matrix.layer is not None and matrix.role not in routers]
    if not all(matrix.activations in passes for matrix in blocks):
        return None
    return limit.int8_rate / sum(
        2 * matrix.used * matrix.rows * matrix.columns * passes[matrix.activations] for matrix in blocks
    )
