"""Chat templates and what every effort means to each: written by hand, compared with what farthing finds out.

Real templates come from the data folder; those here are of our own wording and use each form of variable once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# What a family without levels may think of the room beside the answer.
SHARES = {"minimal": (1, 16), "low": (1, 8), "medium": (1, 4), "high": (1, 2), "xhigh": (2, 3), "max": (4, 5)}
MAX_TOKENS = 4096
ROOM = MAX_TOKENS - 410

BRIEF = {
    "minimal": "Think only as much as you must, a line or two at most, and then give the answer at once.",
    "low": "Keep your reasoning short: take only the steps that the answer needs, do not restate the problem, check "
    "nothing twice, and then answer.",
    "medium": "Reason as far as the problem calls for: be direct where it is easy and careful where it is hard. Leave "
    "out restatements and repeated checks, but never a step that the answer depends on.",
}


@dataclass(frozen=True)
class Case:
    """A template, and what is expected of it.

    Attributes:
        name: of a file in the data folder, or of a template here.
        family: as it is reported.
        on: variables that make it think.
        off: variables that keep it from thinking; None means a budget of 0.
        levels: the variables of each effort, for families with levels; "^" before the effort marks a raised one.
        budget: the variable that takes a number of tokens.
        place: where words for the model go.
        thinks: whether it thinks at all.
        source: the template; None reads the file.
    """

    name: str
    family: str
    on: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Any] | None = None
    levels: dict[str, dict[str, Any]] | None = None
    budget: str | None = None
    place: str = "system"
    thinks: bool = True
    source: str | None = None

    def template(self, data: Path) -> str:
        return (data / "templates" / self.name).read_text(encoding="utf-8") if self.source is None else self.source

    def variables(self, effort: str) -> dict[str, Any]:
        if effort == "none" and self.off is not None:
            return self.off
        if self.levels is not None:
            return self.on | self.levels.get(effort, self.levels.get("^" + effort, {}))
        if self.budget is not None:
            return self.on | {self.budget: self.limit(effort)}
        return self.on

    def limit(self, effort: str) -> int | None:
        if effort == "none":
            return None if self.off is not None or (self.levels and "^none" not in self.levels) else 0
        if self.levels is not None and "^" + effort not in self.levels:
            return None
        share, of = SHARES[effort]
        return ROOM * share // of

    def words(self, effort: str) -> str | None:
        return BRIEF.get(effort) if self.levels is None and effort != "none" else None

    def conversation(self, messages: list[dict[str, Any]], effort: str) -> list[dict[str, Any]]:
        """The messages with the words in their place."""
        words, turns = self.words(effort), [dict(message) for message in messages]
        if words is None:
            return turns
        if self.place == "system":
            if turns[0]["role"] == "system":
                return [turns[0] | {"content": turns[0]["content"] + "\n\n" + words}, *turns[1:]]
            return [{"role": "system", "content": words}, *turns]
        assert turns[-1]["role"] == "user"
        return [*turns[:-1], turns[-1] | {"content": turns[-1]["content"] + "\n\n" + words}]


def switch(name: str, family: str, variable: str = "enable_thinking", **options: Any) -> Case:
    """A template with a switch and no levels."""
    return Case(name, family, on={variable: True}, off={variable: False}, **options)


def levels(variable: str, words: str) -> dict[str, dict[str, Any]]:
    """The variables of each effort, none to max: a word with ^ is a higher level than was asked for, - is left out."""
    given: dict[str, dict[str, Any]] = {}
    for effort, word in zip(EFFORTS, words.split(), strict=True):
        raised, plain = "^" * word.startswith("^"), word.removeprefix("^")
        given[raised + effort] = {} if plain == "-" else {variable: plain}
    return given


LOW_TO_HIGH = "^low ^low low medium high high high"

REAL = [
    switch("Qwen-Qwen3-0.6B.jinja", "Qwen3"),
    switch("Qwen3.5-4B.jinja", "Qwen3"),
    switch("Qwen-QwQ-32B.jinja", "Qwen3"),
    switch("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja", "DeepSeek"),
    switch("GLM-4.7-Flash.jinja", "GLM"),
    switch("HuggingFaceTB-SmolLM3-3B.jinja", "SmolLM3", place="user"),
    switch("openbmb-MiniCPM5-1B.jinja", "<think>"),
    Case("openai-gpt-oss-120b.jinja", "gpt-oss", levels=levels("reasoning_effort", LOW_TO_HIGH)),
    Case("mistralai-Ministral-3-14B-Reasoning-2512.jinja", "Mistral", place="user"),
    Case("LFM2-8B-A1B.jinja", "LFM2", thinks=False),
    Case("mistralai-Mistral-Nemo-Instruct-2407.jinja", "Mistral", thinks=False),
    Case("Mistral-Small-3.2-24B-Instruct-2506.jinja", "Mistral", place="user", thinks=False),
    Case("Qwen-Qwen2.5-7B-Instruct.jinja", "plain", place="user", thinks=False),
    Case("google-gemma-2-2b-it.jinja", "Gemma", place="user", thinks=False),
    Case("meta-llama-Llama-3.2-3B-Instruct.jinja", "plain", thinks=False),
    Case("microsoft-Phi-3.5-mini-instruct.jinja", "plain", thinks=False),
    Case("unsloth-Apriel-1.5.jinja", "plain", thinks=False),
]

TURNS = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}</{{ turn.role }}>\n{% endfor %}"
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
OPEN, CLOSED = "<assistant><think>\n", "<assistant><think>\n\n</think>\n"
BY_THINKING = f"{{% if thinking %}}{OPEN}{{% else %}}{CLOSED}{{% endif %}}"
NO_SUCH = "{{ raise_exception('no such effort') }}"

OWN = [
    switch(
        "a switch, on by default",
        "<think>",
        source=TURNS + "{% set thinking = enable_thinking is not defined or enable_thinking %}" + BY_THINKING,
    ),
    switch(
        "a switch, off by default",
        "<think>",
        variable="thinking",
        source=TURNS + BY_THINKING,
    ),
    Case("always", "<think>", source=TURNS + OPEN),
    Case(
        "a switch without effect",
        "<think>",
        source=TURNS + "{% if enable_thinking and tools %}Think before you call.{% endif %}" + OPEN,
    ),
    Case("no system message", "<think>", place="user", source=REFUSES_SYSTEM + TURNS + OPEN),
    Case(
        "a default system message",
        "<think>",
        place="user",
        source="{% if messages[0].role != 'system' %}<system>Write down your thoughts first.</system>\n{% endif %}"
        + TURNS
        + OPEN,
    ),
    Case(
        "any level is printed",
        "<think>",
        levels=levels("reasoning_effort", LOW_TO_HIGH),
        source="Effort: {{ reasoning_effort | default('medium') }}\n" + TURNS + OPEN,
    ),
    Case(
        "other levels are refused",
        "<think>",
        levels=levels("reasoning_effort", "none ^low low ^high high high high"),
        source="{% if reasoning_effort is not defined %}{% set reasoning_effort = 'low' %}{% endif %}"
        "{% set known = ['none', 'low', 'high'] %}"
        "{% if reasoning_effort not in known %}" + NO_SUCH + "{% endif %}"
        "Effort: {{ reasoning_effort }}\n" + TURNS + OPEN,
    ),
    Case(
        "levels are compared, the middle is unnamed",
        "<think>",
        levels=levels("reasoning_effort", "^low ^low low - high high high"),
        source="{% if reasoning_effort == 'low' %}Be quick.\n"
        "{% elif 'high' == reasoning_effort %}Be thorough.\n{% endif %}" + TURNS + OPEN,
    ),
    Case(
        "levels are looked up",
        "<think>",
        levels=levels("reasoning_effort", "^minimal minimal low low ^max ^max max"),
        source="{% set lines = {'minimal': 'At once.', 'low': 'Quickly.', 'max': 'Whatever it takes.'} %}"
        "{{ lines[reasoning_effort | default('low') | lower] }}\n" + TURNS + OPEN,
    ),
    Case(
        "levels go through a macro",
        "<think>",
        levels=levels("reasoning_effort", "^low ^low low ^high high high high"),
        source="{% macro line(level) %}"
        "{% if level in ('low', 'high') %}Effort {{ level | upper }}\n{% endif %}{% endmacro %}"
        "{{ line(reasoning_effort if reasoning_effort is defined else 'low') }}" + TURNS + OPEN,
    ),
    Case(
        "levels go through a namespace",
        "<think>",
        levels=levels("reasoning_effort", "^medium ^medium ^medium medium ^xhigh xhigh xhigh"),
        source="{% set ns = namespace(effort='') %}{% set ns.effort = reasoning_effort or 'medium' %}"
        "{% if ns.effort is in ['xhigh', 'medium'] %}Effort: {{ ns.effort }}\n{% endif %}" + TURNS + OPEN,
    ),
    Case(
        "strength",
        "Muse",
        levels=levels("reasoning_strength", "^low ^low low medium high xhigh xhigh"),
        source="Think with {{ reasoning_strength | default('medium') }} strength.\n" + TURNS + OPEN,
    ),
    Case(
        "none has another name",
        "<think>",
        levels=levels("reasoning_effort", "no_think ^low low ^high high high high"),
        source="{% if not reasoning_effort is defined %}{% set reasoning_effort = 'no_think' %}"
        "{% elif reasoning_effort not in ['high', 'low', 'no_think'] %}"
        + NO_SUCH
        + "{% endif %}"
        + TURNS
        + "{% set thinking = reasoning_effort in ['low', 'high'] %}{{ reasoning_effort }}"
        + BY_THINKING,
    ),
    Case(
        "a level is the switch",
        "<think>",
        off={"reasoning_effort": "none"},
        source="{% set off = reasoning_effort is defined and reasoning_effort | lower == 'none' %}"
        "{% set thinking = false if off else true %}" + TURNS + BY_THINKING,
    ),
    Case(
        "a switch and levels beyond",
        "<think>",
        on={"enable_thinking": True},
        off={"enable_thinking": False},
        levels=levels("reasoning_effort", "- ^- ^- - high ^max max"),
        source="{% if not thinking is defined %}{% set thinking = enable_thinking | default(false) %}{% endif %}"
        "{% if thinking and reasoning_effort == 'high' %}Effort: high\n"
        "{% elif thinking and reasoning_effort == 'max' %}Effort: beyond\n{% endif %}" + TURNS + BY_THINKING,
    ),
    Case(
        "thinking can't be switched off",
        "<think>",
        levels=levels("reasoning_effort", "^low ^low low medium ^xhigh xhigh xhigh"),
        source="{% if enable_thinking is defined and not enable_thinking %}"
        "{{ raise_exception('it always thinks') }}{% endif %}"
        "{% if reasoning_effort is defined %}{% set resolved = reasoning_effort %}"
        "{% if resolved not in ('xhigh', 'medium', 'low') %}" + NO_SUCH + ""
        "{% elif resolved != 'medium' %}Effort: {{ resolved }}\n{% endif %}{% endif %}" + TURNS + OPEN,
    ),
    Case(
        "the strongest by default",
        "<think>",
        levels=levels("thinking_effort", "^low ^low low ^high high ^max max"),
        source="{% if thinking_effort is undefined %}{% set thinking_effort = 'max' %}{% endif %}"
        "{% if thinking_effort in ['low', 'high', 'max'] %}<effort={{ thinking_effort }}>\n{% endif %}" + TURNS + OPEN,
    ),
    Case(
        "a budget in the prompt",
        "Seed",
        budget="thinking_budget",
        source="{% if thinking_budget is defined and thinking_budget >= 0 %}"
        "At most {{ thinking_budget }} tokens.\n{% endif %}" + TURNS + "<assistant><seed:think>",
    ),
    Case("plain", "plain", thinks=False, source=TURNS + "<assistant>"),
    Case("plain without system messages", "plain", place="user", thinks=False, source=REFUSES_SYSTEM + TURNS),
]
