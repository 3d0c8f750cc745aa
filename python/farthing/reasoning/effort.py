"""One ``effort=`` for every model family, honoured or refused, never ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from .. import _core
from ..errors import UnsupportedError

__all__ = ["EFFORTS", "EffortPlan", "dialect_of", "resolve_effort"]

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True)
class EffortPlan:
    """How a request for an effort is honoured, for whoever renders the prompt and decodes, and for audits.

    Attributes:
        effort: what was asked for.
        family: the model family, as its chat template shows it.
        level: the level that the template is given, of families that have levels.
        template_kwargs: variables for the chat template.
        system_suffix: what the model is told in words; `conversation` puts it in place.
        placement: ``system``, or ``user`` where a system message would be refused or displace the template's own.
        budget: most tokens of thinking. Whoever decodes must keep to it: `LLM` does.
        warnings: what of the request was changed or left undone.
        summary: what was done, in words.
    """

    effort: str
    family: str
    level: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_suffix: str | None = None
    placement: str = "system"
    budget: int | None = None
    warnings: tuple[str, ...] = ()
    summary: str = ""

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages with `system_suffix` in its place; they themselves are not changed.

        Example:
            >>> from farthing.reasoning import EffortPlan
            >>> plan = EffortPlan("low", "Qwen3", system_suffix="Be brief.")
            >>> plan.conversation([{"role": "user", "content": "Hello"}])[0]
            {'role': 'system', 'content': 'Be brief.'}
        """
        turns = [dict(message) for message in messages]
        if self.system_suffix is None:
            return turns
        if self.placement == "system":
            if not turns or turns[0].get("role") not in ("system", "developer"):
                return [{"role": "system", "content": self.system_suffix}, *turns]
            target = turns[0]
        else:
            users = [turn for turn in turns if turn.get("role") == "user"]
            if not users:
                return [*turns, {"role": "user", "content": self.system_suffix}]
            target = users[-1]
        content = target.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            target["content"] = [*content, {"type": "text", "text": self.system_suffix}]
        else:
            target["content"] = f"{content}\n\n{self.system_suffix}" if content else self.system_suffix
        return turns


def resolve_effort(
    tokenizer: Any,
    effort: str,
    *,
    max_tokens: int | None = None,
    context_left: int | None = None,
    answer_reserve: int | None = None,
    thinking_budget: int | None = None,
    thinks: bool | None = None,
    strict: bool = True,
) -> EffortPlan:
    """How a model honours an effort.

    Its chat template is read for the variables that templates have for it (``reasoning_effort``,
    ``reasoning_strength``, ``thinking_effort``, ``enable_thinking``, ``thinking``, ``thinking_budget``) and for the
    values that it compares them with, and rendered with them: a variable without effect counts for nothing.

    * A family with levels gets the nearest one (upwards where two are as near), with a warning if it is another than
      was asked for; if it is a higher one, thinking is bounded as below.
    * A family without levels is switched off for ``none``; for ``minimal`` to ``max`` it may think 1/16, 1/8, 1/4, 1/2,
      2/3 or 4/5 of what ``max_tokens`` and ``context_left`` leave beside the answer, and up to ``medium`` it is told in
      words to be brief. A family that can't be switched off has a budget of 0 for ``none``.
    * A model that does not think has nothing to do for ``none``. All else is refused; with ``strict=False`` it is only
      told in words to be brief, up to ``medium``.

    Args:
        tokenizer: an `LLM` or its tokenizer, a transformers tokenizer or processor, a tokenizer of mistral-common, an
            encoding of openai-harmony, or the source of a chat template.
        effort: none, minimal, low, medium, high, xhigh or max.
        max_tokens: most tokens that may be generated, thinking and answer.
        context_left: what is left of the context behind the prompt.
        answer_reserve: tokens kept for the answer; None keeps a tenth, at least 256.
        thinking_budget: a budget of your own, in place of the family's share.
        thinks: whether the model thinks; None believes its chat template.
        strict: raise where nothing can honour the request; False says in `EffortPlan.warnings` what was done instead.

    Raises:
        UnsupportedError: nothing can honour the request; the message says what would work.
        ValueError: no such effort, or no tokenizer.
        FormatError: the chat template is damaged.

    Example:
        >>> import farthing as ft
        >>> template = "{{ messages[0].content }}{% if enable_thinking is false %}<think></think>{% endif %}"
        >>> ft.reasoning.resolve_effort(template, "none").template_kwargs
        {'enable_thinking': False}
        >>> ft.reasoning.resolve_effort(template, "high", max_tokens=4096).summary
        'at most 1843 tokens of thinking, 1/2 of 3686; enable_thinking=true'
    """
    if effort not in EFFORTS:
        raise ValueError(f"effort: got {effort!r}, expected one of {', '.join(EFFORTS)}")
    dialect = dialect_of(tokenizer)
    if thinks is not None:
        dialect = dialect.assume(thinks)
    tokens = [limit for limit in (max_tokens, context_left) if limit is not None]
    plan = dialect.plan(
        effort,
        tokens=min(tokens) if tokens else None,
        answer_reserve=answer_reserve,
        budget=thinking_budget,
        strict=strict,
    )
    return EffortPlan(
        effort=effort,
        family=dialect.family,
        level=plan.level,
        template_kwargs=json.loads(plan.template_kwargs),
        system_suffix=plan.system_suffix,
        placement=plan.placement,
        budget=plan.budget,
        warnings=tuple(plan.warnings),
        summary=plan.summary,
    )


@lru_cache(maxsize=64)
def _dialect(template: str, bos_token: str | None, eos_token: str | None) -> _core.Dialect:
    return _core.Dialect(template, bos_token=bos_token, eos_token=eos_token)


def dialect_of(tokenizer: Any) -> _core.Dialect:
    """How the model of that tokenizer is told how much to think."""
    if isinstance(tokenizer, _core.Dialect):
        return tokenizer
    if isinstance(tokenizer, str):
        return _dialect(tokenizer, None, None)
    core = getattr(tokenizer, "_core", None)
    if isinstance(core, _core.Llm):
        return core.dialect()
    if hasattr(tokenizer, "render_conversation_for_completion"):  # openai-harmony, which has no template
        return _core.Dialect.of_levels("gpt-oss", "reasoning_effort", ["low", "medium", "high"])
    if (mistral := _mistral(tokenizer)) is not None:
        return mistral
    if not hasattr(tokenizer, "chat_template"):
        got = type(tokenizer).__name__
        raise ValueError(f"tokenizer: got {got}, expected an LLM, a tokenizer or the source of a chat template")
    return _dialect(_template(tokenizer), *(_token(tokenizer, name) for name in ("bos_token", "eos_token")))


def _template(tokenizer: Any) -> str:
    """The template of a transformers tokenizer; several have names."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if template is None:
        raise UnsupportedError(
            f"effort with a {type(tokenizer).__name__} without a chat template is not supported; pass the template's "
            "source, or set tokenizer.chat_template"
        )
    return str(template)


def _token(tokenizer: Any, name: str) -> str | None:
    token = getattr(tokenizer, name, None)
    return None if token is None else str(token)


def _mistral(tokenizer: Any) -> _core.Dialect | None:
    """The levels that a tokenizer of mistral-common carries (from v15 on), or None for other tokenizers."""
    for name in ("", "tokenizer", "instruct_tokenizer", "tokenizer"):
        tokenizer = getattr(tokenizer, name, tokenizer) if name else tokenizer
        if hasattr(tokenizer, "model_settings_builder"):
            builder = getattr(tokenizer.model_settings_builder, "reasoning_effort", None)
            levels = [] if builder is None else [str(getattr(value, "value", value)) for value in builder.values]
            dialect = _core.Dialect.of_levels("Mistral", "reasoning_effort", levels)
            marked = not levels and tokenizer.is_special("[THINK]") and tokenizer.is_special("[/THINK]")
            return dialect.assume(True) if marked else dialect
    return None
