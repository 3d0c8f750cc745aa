"""Thinking budgets in vLLM: one logits processor for both of its model runners."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import UnsupportedError
from .controller import Controller, ThinkSpec
from .hosts import limited
from .policy import Policy

__all__ = ["make_processor", "wanted"]

# Keys of `SamplingParams.extra_args` that are ours.
_KEYS = ("thinking_budget", "thinking")
# vLLM drops keys that nobody knows: one of these is a wish that would not be heard.
_SOUNDS_LIKE = ("think", "reason", "effort", "budget")
_UNBOUNDED = 2**31 - 1


def wanted(params: Any) -> Policy | None:
    """What the request of vLLM's ``SamplingParams`` asks for.

    Raises:
        ValueError: a value is out of range, or a key looks like a wish and is none of ours.
    """
    asked: Mapping[str, Any] = params.extra_args or {}
    for key in asked:
        if key not in _KEYS and any(word in key.lower() for word in _SOUNDS_LIKE):
            raise ValueError(
                f"extra_args: got {key!r}, expected thinking_budget (a number) or thinking (a Policy's arguments); "
                "effort goes to the chat template, as farthing.reasoning.resolve_effort says"
            )
    budget, thinking = asked.get("thinking_budget"), asked.get("thinking")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or not 0 <= budget < 2**31):
        raise ValueError(f"thinking_budget: got {budget!r}, expected an integer ≥ 0")
    if thinking is None:
        return limited(None, budget)
    if isinstance(thinking, str):  # over HTTP, extra arguments are numbers and texts
        try:
            thinking = json.loads(thinking)
        except ValueError as error:
            raise ValueError(f"thinking: got {thinking!r}, expected JSON: {error}") from None
    if not isinstance(thinking, Mapping):
        raise ValueError(f"thinking: got {type(thinking).__name__}, expected a dict of Policy's arguments")
    known = {field.name for field in fields(Policy) if field.init}
    if unknown := sorted(set(thinking) - known):
        raise ValueError(f"thinking: got {', '.join(unknown)}, expected some of {', '.join(sorted(known))}")
    return limited(Policy(**thinking), budget)


class _Request:
    """One sequence: its controller, its output where V1 keeps it, and how much of that the controller has seen.

    ``offset`` is the length of its prompt, behind which V2 keeps the output.
    """

    def __init__(self, controller: Controller, output: Sequence[int] = (), offset: int = 0) -> None:
        self.output = output
        self.offset = offset
        self._controller = controller
        self._seen = 0

    def follow(self, output: Sequence[int]) -> Controller:
        """Takes in what is new of the output; tokens that are on their way still stand there as -1."""
        new = list(output[self._seen :])
        if -1 in new:
            new = new[: new.index(-1)]
        self._controller.extend(new)
        self._seen += len(new)
        return self._controller


class _Processor:
    """The processor less the classes of vLLM that it derives from."""

    def __init__(self, vllm_config: Any, *host: Any) -> None:
        # The V1 runner gives (device, is_pin_memory), the V2 runner its states of requests.
        self._states: Any = host[0] if len(host) == 1 else None
        self._model = vllm_config.model_config
        self._specs: dict[tuple[str | None, ...], ThinkSpec] = {}
        # By row of the batch (V1) or by slot (V2).
        self._requests: dict[int, _Request] = {}
        self._admitted: dict[int, tuple[Policy, int | None]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuses a request whose wishes can't be read."""
        wanted(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """The likeliest token may become another."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: takes in which rows left, came and moved, in this order."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._requests.pop(row, None)
        for row, params, prompt, output in batch_update.added:
            self._requests.pop(row, None)
            if (policy := wanted(params)) is not None:
                controller = self._controller(policy, prompt or (), params.max_tokens)
                self._requests[row] = _Request(controller, output)
        for source, target, direction in batch_update.moved:
            moved, displaced = self._requests.pop(source, None), self._requests.pop(target, None)
            if moved is not None:
                self._requests[target] = moved
            if displaced is not None and direction.name == "SWAP":
                self._requests[source] = displaced

    def apply_staged_writes(self) -> None:
        """V2: nothing is staged."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request enters a slot; whether it wants anything."""
        self._requests.pop(req_idx, None)
        self._admitted.pop(req_idx, None)
        if (policy := wanted(sampling_params)) is None:
            return False
        self._admitted[req_idx] = policy, sampling_params.max_tokens
        return True

    def apply(self, logits: Any, ctx: Any = None) -> Any:
        """Steers ``logits`` (rows, V) in place; ``ctx`` is the V2 runner's."""
        if ctx is not None:
            self._apply_to_slots(logits, ctx)
            return logits
        for row, request in self._requests.items():
            _steer(logits, row, request.follow(request.output))
        return logits

    def _apply_to_slots(self, logits: Any, ctx: Any) -> None:
        """Rows of one slot stand behind its committed tokens, and behind more and more of its drafts."""
        if not self._requests and not self._admitted:
            return
        columns = ctx.expanded_idx_mapping, ctx.expanded_local_pos, ctx.input_ids, ctx.pos
        rows = sorted(zip(*(column.tolist() for column in columns), range(len(logits)), strict=False))
        controller: Controller | None = None
        for slot, local, token, position, row in rows:
            if local == 0:
                controller = self._committed(slot, position + 1)
            elif controller is not None:
                controller.push(token)
            if controller is not None:
                _steer(logits, row, controller)

    def _committed(self, slot: int, length: int) -> Controller | None:
        """A copy of the controller behind the first ``length`` tokens of a slot, if it has one."""
        tokens = self._states.all_token_ids.gpu
        if slot in self._admitted:
            prompt = int(self._states.prompt_len.np[slot])
            if length < prompt:
                return None  # a part of a prompt: nothing is drawn there
            policy, most = self._admitted.pop(slot)
            self._requests[slot] = _Request(
                self._controller(policy, tokens[slot, :prompt].tolist(), most), offset=prompt
            )
        request = self._requests.get(slot)
        if request is None:
            return None
        return request.follow(tokens[slot, request.offset : length].tolist()).copy()

    def _controller(self, policy: Policy, prompt: Sequence[int], max_tokens: int | None) -> Controller:
        markers = policy.start, policy.end, policy.message
        if markers not in self._specs:
            self._specs[markers] = ThinkSpec.from_tokenizer(self._tokenizer(), *markers)
        return Controller(self._specs[markers], policy, prompt, _UNBOUNDED if max_tokens is None else max_tokens)

    def _tokenizer(self) -> Any:
        tokenizer = import_module("vllm.tokenizers").cached_tokenizer_from_config(self._model)
        if tokenizer is None:
            raise UnsupportedError("a thinking budget without a tokenizer is not supported; drop skip_tokenizer_init")
        return tokenizer


def _steer(logits: Any, row: int, controller: Controller) -> None:
    values = logits[row]
    on_host = values.device.type == "cpu" and values.is_contiguous() and values.element_size() == np.float32().nbytes
    host = values.numpy() if on_host else values.float().cpu().numpy()
    controller.process(host)
    if not on_host:
        values.copy_(values.new_tensor(host))


@cache
def make_processor() -> type:
    """The class for the vLLM that is installed, one and the same for both of its model runners."""
    runners = []
    for module in ("vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor"):
        try:
            runners.append(import_module(module).LogitsProcessor)
        except ModuleNotFoundError as error:
            if error.name == "vllm" or error.name is None:
                raise UnsupportedError("vLLM is not installed; pip install vllm") from None
    # Engine processes look the class up where users name it.
    return type(
        "ThinkingProcessor", (_Processor, *runners), {"__module__": "farthing.vllm", "__doc__": _Processor.__doc__}
    )
