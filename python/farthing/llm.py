"""A loaded model: text or token ids in, completions and their cost out."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from . import _core
from .completion import Completion, Stream, completion
from .errors import UnsupportedError
from .explanation import Explanation
from .ledger import EngineLedger, from_core
from .names import locate
from .reasoning.effort import EffortPlan, resolve_effort
from .reasoning.policy import Policy
from .sampling import SamplingParams, integer, number
from .sizes import byte_count
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .speculative.engine import SpeculationReport

__all__ = ["LLM", "Conversation", "Prompt"]

Prompt = str | Sequence[int] | npt.NDArray[np.integer[Any]]
Conversation = Sequence[Mapping[str, Any]]
_Ready = str | npt.NDArray[np.uint32]


class LLM:
    """A model and its engine. One object serves any number of threads.

    Args:
        model: path of a GGUF file or checkpoint directory, the alias ``smollm2-135m``, or a Hub id (``repo``,
            ``repo@revision``, ``repo:file.gguf``).
        weights: ``auto`` (as the file stores them), ``f32``, ``bf16``, ``int8`` or ``int4``.
        activations: what integer weights meet: ``auto`` (a fixed rule by matrix), ``a8``, ``a16`` or ``f32``.
        kv: keys and values: ``auto`` (f16, or f32 under f32 weights), ``f32``, ``f16`` or ``bf16``.
        speculation: who drafts tokens that the model then verifies, several in one pass: ``auto``, None (nobody), a
            drafter of `farthing.speculative` or any object with its method ``draft``, or a list of them, of which later
            ones extend what earlier ones drafted. Results do not depend on it. How many drafts are verified is decided
            by what they are expected to save; the first load of a model on a machine measures that for some seconds.
        draft_tokens: verify so many drafted tokens of each request in each pass, whether that pays or not.
        threads: None takes what the environment, the affinity mask and the cgroup quota allow.
        max_sequences: most sequences in one step.
        context: longest sequence, prompt and answer; None takes the model's own.
        chunk: most prompt tokens in one step; None takes 512. Results do not depend on it.
        kv_pages: pages of 32 tokens for all sequences together; None takes what ``max_sequences`` contexts need, up to
            a quarter of the memory.
        expert_memory: most bytes of a mixture's experts in memory, a number or text such as ``"2GB"`` or ``"500MiB"``.
            The others stay on disk, packed in the cache directory (``$XDG_CACHE_HOME/farthing/experts``) at the first
            load, and are fetched when a token is sent to them. Results do not depend on it. None keeps all in memory.
        expert_skip: lossy. Leaves out those of a token's experts whose weight is below this part of its largest (above
            0, at most 1; 0.2, say); the others' weights are renormalised where the model's family does so. A token
            still gets the same bits whatever is computed beside it. ``python -m benches.moe_levers`` measures what it
            costs and saves. None leaves out none.
        expert_cache_margin: lossy, and **the same request may give other bits each time**: under ``expert_memory``, an
            expert in memory is taken before one on disk whose score is larger, as long as it is short of it by at most
            this part (above 0, below 1; 0.2, say). What is in memory depends on everything computed before and beside,
            so tokens do too: on other requests, on chunks, on timing, under a fixed seed as well. None lets the routers
            choose.
        progress: called as ``progress(stage, done, total)`` while the model loads (stage ``load``), at most ten times a
            second.

    Raises:
        FormatError: the file is damaged.
        UnsupportedError: the model or an option is of a kind farthing does not know.
        ModelNotFoundError: no such file, alias or Hub repository.
        ValueError: an argument is out of range.
        MemoryError: weights or pages do not fit.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "smollm2-135m",
        *,
        weights: str = "auto",
        activations: str = "auto",
        kv: str = "auto",
        speculation: Any = "auto",
        draft_tokens: int | None = None,
        threads: int | None = None,
        max_sequences: int = 16,
        context: int | None = None,
        chunk: int | None = None,
        kv_pages: int | None = None,
        expert_memory: int | str | None = None,
        expert_skip: float | None = None,
        expert_cache_margin: float | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        sizes = {"threads": threads, "context": context, "chunk": chunk, "kv_pages": kv_pages}
        options = {name: None if value is None else integer(name, value, 1) for name, value in sizes.items()}
        for name, word in {"weights": weights, "activations": activations, "kv": kv}.items():
            if not isinstance(word, str):
                raise ValueError(f"{name}: got {word!r}, expected a word such as 'auto'")
        shares = {"expert_skip": expert_skip, "expert_cache_margin": expert_cache_margin}
        self._lossy = {name: number(name, value) for name, value in shares.items() if value is not None}
        self.path: Path = locate(model)
        from .speculative.engine import drafters  # not at the top: importing farthing is to be quick

        # Under a margin text depends on what is in memory, so "auto" is nobody; any drafter is refused.
        margin_alone = speculation == "auto" and expert_cache_margin is not None
        self._core = _core.Llm(
            self.path,
            weights=weights,
            activations=activations,
            kv=kv,
            max_sequences=integer("max_sequences", max_sequences, 1),
            expert_memory=None if expert_memory is None else byte_count("expert_memory", expert_memory),
            expert_skip=self._lossy.get("expert_skip"),
            expert_cache_margin=self._lossy.get("expert_cache_margin"),
            speculation=drafters(None if margin_alone else speculation),
            draft_tokens=None if draft_tokens is None else integer("draft_tokens", draft_tokens, 0, 63),
            progress=progress,
            **options,
        )
        self.tokenizer = Tokenizer(self._core)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Continues each prompt; all are computed together.

        Args:
            prompts: one prompt or a list of them; a prompt is text (special tokens in it are recognised) or token ids.
            params: one for all prompts, or a list with one for each.

        Returns:
            One completion per prompt, in order.
        """
        many: list[Any] = [prompts] if _is_prompt(prompts) else _list("prompts", prompts)
        each = _each(params, len(many))
        for entry in each:
            _refuse_effort(entry)
        return self._finish(
            [_Request(_prompt(prompt), entry) for prompt, entry in zip(many, each, strict=True)], rendered=False
        )

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **variables: Any,
    ) -> list[Completion]:
        """Answers each conversation in the model's own chat format.

        Args:
            messages: one conversation (a list of ``{"role": ..., "content": ...}``) or a list of them.
            params: one for all conversations, or a list with one for each.
            variables: further variables of the chat template, such as ``tools`` or ``enable_thinking``.

        Returns:
            One completion per conversation, in order.
        """
        many: list[Any] = [messages] if _is_conversation(messages) else _list("messages", messages)
        each = _each(params, len(many))
        requests = [self._conversation(turns, entry, variables) for turns, entry in zip(many, each, strict=True)]
        for text in dict.fromkeys(text for request in requests for text in request.warnings):
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        return self._finish(requests, rendered=True)

    def stream(
        self,
        prompt: Prompt | Conversation,
        params: SamplingParams | None = None,
        *,
        progress: Callable[[str, int, int], None] | None = None,
        on_thinking: Callable[[str], None] | None = None,
        **variables: Any,
    ) -> Stream:
        """Answers one prompt or conversation piece by piece.

        Args:
            prompt: text, token ids, or a conversation (which the chat template renders, with ``variables``).
            params: how to answer.
            progress: called as ``progress("prompt", computed, total)`` while a long prompt is computed.
            on_thinking: called with each piece of thinking as it is written.
            variables: further variables of the chat template.

        Returns:
            An iterator over pieces of the answer's text that then has ``.completion``; closing it cancels the request.
        """
        checked = _params(params)
        if rendered := _is_conversation(prompt):
            request = self._conversation(prompt, checked, variables)
        elif variables:
            raise ValueError(
                f"stream: got {', '.join(variables)}, expected template variables with a conversation only"
            )
        else:
            _refuse_effort(checked)
            request = _Request(_prompt(prompt), checked)
        for text in request.warnings:
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        (core,) = self._core.submit([request.prompt], [request.params._core], rendered)
        return Stream(core, progress, on_thinking, request.effort)

    def chat_prompt(self, messages: Conversation, **variables: Any) -> str:
        """The text the model's chat template makes of a conversation, ready for its answer."""
        if not _is_conversation(messages):
            raise ValueError(f"messages: got {messages!r}, expected a list of messages with role and content")
        try:
            rendered = json.dumps([dict(message) for message in messages]), json.dumps(variables)
        except (TypeError, ValueError) as error:
            raise ValueError(f"messages: expected values that JSON can hold: {error}") from None
        return self._core.chat_prompt(*rendered)

    def logits(self, token_ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """The model's logits after each of the ids, float32 (T, V)."""
        return self._core.logits(_token_ids(token_ids))

    def hidden(self, token_ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """The model's states behind the last block and the final norm, float32 (T, hidden): what the head reads.

        Raises:
            ValueError: no tokens, more than the context holds, or ids outside the vocabulary.

        Example:
            ``states = llm.hidden([1, 2, 3])  # (3, 576) for smollm2-135m``
        """
        return self._core.hidden(_token_ids(token_ids))

    @property
    def ledger(self) -> EngineLedger:
        """What this engine has done so far."""
        ledger: EngineLedger = from_core(EngineLedger, self._core.ledger())
        return ledger

    @property
    def speculation(self) -> SpeculationReport | None:
        """What passes of several rows cost and what drafters have achieved; None before the first answer."""
        from .speculative.engine import SpeculationReport

        report = self._core.speculation()
        return None if report is None else SpeculationReport.of(report)

    def explain(self) -> Explanation:
        """Kernel, format, precision and bytes of every matrix, what is in memory, and which levers are lossy."""
        return Explanation.of(
            self._core.explain(),
            self._core.resident_bytes,
            (f"{name}={value:g}" for name, value in self._lossy.items()),
        )

    def _conversation(self, messages: Conversation, params: SamplingParams, variables: Mapping[str, Any]) -> _Request:
        """A conversation rendered as its effort wants it, with the budget that this takes."""
        if params.effort is None:
            return _Request(self.chat_prompt(messages, **variables), params)
        plan, left = params.effort, self.context
        if not isinstance(plan, EffortPlan):
            plan = self._plan(plan, params, left)
        prompt = self._render(messages, plan, variables)
        # A text has no more tokens than bytes.
        if plan is not params.effort and len(prompt.encode()) + params.max_tokens > left:
            left -= len(self.tokenizer.encode(prompt))
            if 0 < left < params.max_tokens:
                plan = self._plan(plan.effort, params, left)
                prompt = self._render(messages, plan, variables)
        if plan.budget is not None and params.thinking_budget is None:
            policy = params.thinking
            if plan.effort == "none" and policy is None:  # nothing was thought: nothing is handed over
                policy = Policy(message="", ramp=None, loop_guard=False)
            params = replace(params, thinking_budget=plan.budget, thinking=policy)
        return _Request(prompt, params, plan)

    def _plan(self, effort: str, params: SamplingParams, context_left: int) -> EffortPlan:
        return resolve_effort(
            self,
            effort,
            max_tokens=params.max_tokens,
            context_left=context_left,
            thinking_budget=params.thinking_budget,
            # Markers of one's own say that the model is made to think between them.
            thinks=True if params.thinking is not None and params.thinking.end is not None else None,
        )

    def _render(self, messages: Conversation, plan: EffortPlan, variables: Mapping[str, Any]) -> str:
        if not _is_conversation(messages):
            return self.chat_prompt(messages)  # says what is wrong with them
        for name in plan.template_kwargs.keys() & variables.keys():
            if variables[name] != plan.template_kwargs[name]:
                got = f"{name}={variables[name]!r} with effort={plan.effort!r}"
                raise ValueError(f"{got}: got two answers to one question, expected {name} or effort, not both")
        return self.chat_prompt(plan.conversation(messages), **{**variables, **plan.template_kwargs})

    def _finish(self, requests: list[_Request], *, rendered: bool) -> list[Completion]:
        prompts = [request.prompt for request in requests]
        streams = self._core.submit(prompts, [request.params._core for request in requests], rendered)
        # A stream that is dropped before its end (an interrupt, an error) cancels its request.
        completions = [
            completion(stream.wait(), request.effort) for stream, request in zip(streams, requests, strict=True)
        ]
        for text in self._core.take_warnings():
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        return completions

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works."""
        return self._core.has_chat_template

    @property
    def vocabulary(self) -> int:
        """Number of token ids, the width of `logits`."""
        return self._core.vocab

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self._core.threads

    @property
    def context(self) -> int:
        """Longest sequence in tokens, prompt and answer."""
        return self._core.context

    def __repr__(self) -> str:
        return f"LLM({os.fspath(self.path)!r})"


class _Request(NamedTuple):
    """A prompt that is ready, and how to answer it."""

    prompt: _Ready
    params: SamplingParams
    effort: EffortPlan | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        return () if self.effort is None else self.effort.warnings


def _params(params: SamplingParams | None) -> SamplingParams:
    if params is None:
        params = SamplingParams()
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params: got {type(params).__name__}, expected SamplingParams")
    return params


def _each(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    """The parameters of each of the prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [_params(params)] * prompts
    each = [_params(entry) for entry in _list("params", params)]
    if len(each) != prompts:
        raise ValueError(f"params: got {len(each)}, expected one, or one for each of the {prompts} prompts")
    return each


def _refuse_effort(params: SamplingParams) -> None:
    if params.effort is not None:
        effort = params.effort.effort if isinstance(params.effort, EffortPlan) else params.effort
        raise UnsupportedError(
            f"effort={effort!r} of raw text is not supported, since it is the chat template that is told; give a "
            "conversation to chat or stream, or bound the thinking by thinking_budget"
        )


def _list(name: str, value: Any) -> list[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
        raise ValueError(f"{name}: got {type(value).__name__}, expected one of them or a list")
    return list(value)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype != object
    return isinstance(value, str) or (isinstance(value, Sequence) and len(value) > 0 and _is_integer(value[0]))


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_conversation(value: Any) -> TypeGuard[Conversation]:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(message, Mapping) for message in value)
    )


def _prompt(prompt: Any) -> _Ready:
    return prompt if isinstance(prompt, str) else _token_ids(prompt, "prompt")


def _token_ids(ids: Any, name: str = "token_ids") -> npt.NDArray[np.uint32]:
    """The ids as a uint32 vector, or a ValueError."""
    try:
        array = np.asarray(ids)
    except ValueError:
        array = np.empty((0, 0))
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.uint32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        kind = f"{array.dtype} of shape {array.shape}" if isinstance(ids, np.ndarray) else repr(ids)[:80]
        raise ValueError(f"{name}: got {kind}, expected text or a list of token ids")
    if array.min() < 0 or array.max() >= 2**32:
        raise ValueError(f"{name}: got {array.min()} to {array.max()}, expected token ids ≥ 0")
    return array.astype(np.uint32)
