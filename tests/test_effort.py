"""One effort for every family: the exact prompt is the reference's, and what can't be honoured is said."""

from __future__ import annotations

import base64
import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import farthing as ft
import pytest
import tiny
from conftest import DATA
from efforts import BRIEF, EFFORTS, MAX_TOKENS, OWN, REAL, ROOM, Case, levels
from farthing.reasoning import EffortPlan, Policy, resolve_effort

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

CONVERSATIONS = [
    [{"role": "user", "content": "What is 17 · 3?"}],
    [
        {"role": "user", "content": "What is 17 · 3?"},
        {"role": "assistant", "content": "51"},
        {"role": "user", "content": "And twice that?"},
    ],
]
WITH_SYSTEM = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is 17 · 3?"}]

CASES = [*REAL, *OWN]
THINKING = [case for case in CASES if case.thinks]
PLAIN = [case for case in CASES if not case.thinks]


def named(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def source_of(case: Case) -> str:
    if case.source is None and not DATA.is_dir():
        pytest.skip(f"needs the data folder at {DATA} (or FARTHING_DATA)")
    return case.template(DATA)


@pytest.fixture(scope="module")
def peer() -> Any:
    """A transformers tokenizer of bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<think>", "</think>"]
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def models(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ft.LLM]:
    """A tiny random model that carries a chat template."""
    root = tmp_path_factory.mktemp("effort")
    weights = tiny.build(tiny.Tiny("llama-effort", "LlamaConfig", {"max_position_embeddings": 8192}), root / "weights")
    peer.save_pretrained(weights)

    def load(template: str) -> ft.LLM:
        directory = root / "model"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for file in weights.iterdir():
            (directory / file.name).symlink_to(file)
        (directory / "chat_template.jinja").unlink(missing_ok=True)
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        return ft.LLM(directory, speculation=None, max_sequences=1, threads=1)

    return load


def reference(peer: Any, template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    """What transformers renders."""
    text = peer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **variables
    )
    assert isinstance(text, str)
    return text


def conversations(case: Case) -> Iterator[list[dict[str, Any]]]:
    yield from CONVERSATIONS
    if case.name not in ("no system message", "plain without system messages", "google-gemma-2-2b-it.jinja"):
        yield WITH_SYSTEM


@named(THINKING)
def test_prompts_are_the_references(case: Case, peer: Any, models: Callable[[str], ft.LLM]) -> None:
    template = source_of(case)
    peer.chat_template = template
    llm = models(template)
    for effort in EFFORTS:
        plan = resolve_effort(peer, effort, max_tokens=MAX_TOKENS)
        assert plan == resolve_effort(llm, effort, max_tokens=MAX_TOKENS), "one template, two plans"
        assert (plan.effort, plan.family) == (effort, case.family)
        assert plan.template_kwargs == case.variables(effort), effort
        assert plan.budget == case.limit(effort), effort
        assert plan.system_suffix == case.words(effort), effort
        assert plan.summary
        for messages in conversations(case):
            expected = reference(peer, template, case.conversation(messages, effort), case.variables(effort))
            assert llm.chat_prompt(plan.conversation(messages), **plan.template_kwargs) == expected, effort


@named(THINKING)
def test_another_level_is_a_warning(case: Case) -> None:
    template = source_of(case)
    for effort in EFFORTS:
        plan = resolve_effort(template, effort, max_tokens=MAX_TOKENS)
        switched_off = effort == "none" and case.off is not None
        changed = case.levels is not None and not switched_off and plan.level != effort
        assert len(plan.warnings) == changed, (effort, plan.warnings)
        if changed:
            assert repr(effort).replace("'", '"') in plan.warnings[0]
            assert repr(plan.level).replace("'", '"') in plan.warnings[0]


@named(PLAIN)
def test_a_model_that_does_not_think(case: Case, peer: Any, models: Callable[[str], ft.LLM]) -> None:
    template = source_of(case)
    plan = resolve_effort(template, "none")
    assert not plan.template_kwargs
    assert (plan.budget, plan.system_suffix, plan.warnings) == (None, None, ())
    llm = models(template)
    for effort in EFFORTS[1:]:
        with pytest.raises(ft.UnsupportedError, match=r"knows no thinking.*thinks=True"):
            resolve_effort(template, effort, max_tokens=MAX_TOKENS)
        plan = resolve_effort(llm, effort, max_tokens=MAX_TOKENS, strict=False)
        assert (plan.template_kwargs, plan.budget, plan.system_suffix) == ({}, None, BRIEF.get(effort))
        assert len(plan.warnings) == 1
        assert "only told in words" in plan.warnings[0] or "nothing is changed" in plan.warnings[0]
        for messages in conversations(case):
            expected = reference(peer, template, case.conversation(messages, effort), {})
            assert llm.chat_prompt(plan.conversation(messages)) == expected
    # Who knows better may say so.
    plan = resolve_effort(template, "high", max_tokens=MAX_TOKENS, thinks=True)
    assert (plan.budget, plan.warnings) == (ROOM // 2, ())
    assert resolve_effort(template, "none", thinks=True).budget == 0


def test_room_for_the_answer() -> None:
    template = next(case.source for case in OWN if case.name == "a switch, on by default")
    assert template is not None
    with pytest.raises(ft.UnsupportedError, match=r"64 tokens, 256 of them kept.*max_tokens of at least 264"):
        resolve_effort(template, "low", max_tokens=64)
    assert resolve_effort(template, "low", max_tokens=264).budget == 1
    plan = resolve_effort(template, "low", max_tokens=64, strict=False)
    assert (plan.budget, plan.template_kwargs) == (0, {"enable_thinking": False})
    assert "switched off" in plan.warnings[0]
    with pytest.raises(ft.UnsupportedError, match="give max_tokens"):
        resolve_effort(template, "low")
    assert resolve_effort(template, "low", strict=False).budget is None
    assert resolve_effort(template, "none").budget is None
    assert resolve_effort(template, "high", max_tokens=9000, context_left=1256, answer_reserve=256).budget == 500
    plan = resolve_effort(template, "high", max_tokens=64, thinking_budget=7)
    assert (plan.budget, plan.warnings) == (7, ())


def test_bad_arguments() -> None:
    for effort in ("", "LOW", "extreme", None, 3):
        with pytest.raises(ValueError, match=r"effort: got .*, expected one of none, minimal"):
            resolve_effort("{{ messages }}", effort)  # type: ignore[arg-type]
        if effort is not None:
            with pytest.raises(ValueError, match=r"effort: got .*, expected one of none, minimal"):
                ft.SamplingParams(effort=effort)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokenizer: got int"):
        resolve_effort(3, "low")
    with pytest.raises(ft.FormatError):
        resolve_effort("{% if %}", "low")


def test_a_tokenizer_without_a_template_says_so(peer: Any) -> None:
    peer.chat_template = None
    with pytest.raises(ft.UnsupportedError, match="without a chat template"):
        resolve_effort(peer, "low")


def test_words_go_behind_parts_of_a_message() -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image"}]
    plan = EffortPlan("low", "plain", system_suffix="Be brief.", placement="user")
    (turn,) = plan.conversation([{"role": "user", "content": parts}])
    assert turn["content"] == [*parts, {"type": "text", "text": "Be brief."}]
    assert len(parts) == 2


@pytest.fixture(scope="module")
def switched(models: Callable[[str], ft.LLM]) -> ft.LLM:
    return models(next(case.source or "" for case in OWN if case.name == "a switch, off by default"))


def test_chat_takes_the_effort(switched: ft.LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    params = ft.SamplingParams(max_tokens=4, effort="none")
    (answer,) = switched.chat(messages, params)
    plan = resolve_effort(switched, "none", max_tokens=4)
    assert answer.effort == plan
    prompt = switched.chat_prompt(messages, thinking=False)
    assert answer.ledger.prompt_tokens == len(switched.tokenizer.encode(prompt))
    stream = switched.stream(messages, params)
    assert (stream.completion.token_ids, stream.completion.effort) == (answer.token_ids, plan)
    assert switched.chat(messages, ft.SamplingParams(max_tokens=4))[0].effort is None
    with pytest.raises(ValueError, match=r"thinking=True with effort='none'"):
        switched.chat(messages, params, thinking=True)
    assert switched.chat(messages, params, thinking=False)[0].effort == plan


def test_chat_keeps_to_the_budget(models: Callable[[str], ft.LLM]) -> None:
    """What the plan says is what the engine does; a random model would think to the end."""
    messages = [{"role": "user", "content": "Hello"}]
    llm = models(next(case.source or "" for case in OWN if case.name == "always"))
    spent = {}
    for effort in ("none", "minimal", "low", "max"):
        (answer,) = llm.chat(messages, ft.SamplingParams(max_tokens=512, effort=effort, temperature=1.0, seed=3))
        assert answer.effort is not None
        spent[effort] = answer.ledger.thinking_tokens
        assert answer.effort.budget == {"none": 0, "minimal": 16, "low": 32, "max": 204}[effort]
        assert spent[effort] <= answer.effort.budget
        assert answer.text
        (same,) = llm.chat(messages, ft.SamplingParams(max_tokens=512, effort=answer.effort, temperature=1.0, seed=3))
        assert same.token_ids == answer.token_ids, "a plan made before is the same wish"
    assert spent["none"] == 0 < spent["low"]
    # One's own budget goes first.
    (answer,) = llm.chat(messages, ft.SamplingParams(max_tokens=512, effort="max", thinking_budget=5, seed=3))
    assert answer.effort is not None
    assert (answer.effort.budget, answer.ledger.thinking_tokens) == (5, 5)


def test_markers_of_ones_own_make_a_plain_model_think(models: Callable[[str], ft.LLM]) -> None:
    llm = models(next(case.source or "" for case in OWN if case.name == "plain"))
    policy = Policy(end="####", ramp=None, loop_guard=False)
    messages = [{"role": "user", "content": "Hello"}]
    (answer,) = llm.chat(messages, ft.SamplingParams(max_tokens=512, effort="low", thinking=policy, seed=3))
    assert answer.effort is not None
    assert answer.effort.budget == 32
    assert answer.ledger.thinking_tokens <= 32


def test_raw_text_has_no_effort(switched: ft.LLM) -> None:
    params = ft.SamplingParams(max_tokens=4, effort="none")
    for ask in (switched.generate, switched.stream):
        with pytest.raises(ft.UnsupportedError, match=r"effort='none' of raw text.*chat"):
            ask("Hello", params)


def test_a_plan_that_was_made_before(models: Callable[[str], ft.LLM]) -> None:
    llm = models(next(case.source or "" for case in OWN if case.name == "plain"))
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(ft.UnsupportedError, match="knows no thinking"):
        llm.chat(messages, ft.SamplingParams(max_tokens=4, effort="low"))
    plan = resolve_effort(llm, "low", strict=False)
    with pytest.warns(RuntimeWarning, match="only told in words"):
        (answer,) = llm.chat(messages, ft.SamplingParams(max_tokens=4, effort=plan))
    assert answer.effort == plan
    prompt = llm.chat_prompt([{"role": "system", "content": BRIEF["low"]}, *messages])
    assert answer.ledger.prompt_tokens == len(llm.tokenizer.encode(prompt))


def test_harmony(models: Callable[[str], ft.LLM]) -> None:
    """gpt-oss's template gives the text that OpenAI's own renderer gives."""
    harmony = pytest.importorskip("openai_harmony")
    case = next(case for case in REAL if case.family == "gpt-oss")
    llm = models(source_of(case))
    try:
        encoding = harmony.load_harmony_encoding("HarmonyGptOss")
    except harmony.HarmonyError as error:
        where = os.environ.get("TIKTOKEN_ENCODINGS_BASE", "not set")
        pytest.skip(f"needs harmony's vocabulary (TIKTOKEN_ENCODINGS_BASE is {where}): {error}")
    today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    for effort in EFFORTS:
        plan = resolve_effort(encoding, effort, max_tokens=MAX_TOKENS)
        assert plan.template_kwargs == case.variables(effort)
        assert plan.budget == case.limit(effort)
        system = harmony.SystemContent.new().with_conversation_start_date(today)
        system = system.with_reasoning_effort(harmony.ReasoningEffort(plan.level.title()))  # type: ignore[union-attr]
        messages = [
            harmony.Message.from_role_and_content(harmony.Role.SYSTEM, system),
            harmony.Message.from_role_and_content(harmony.Role.USER, "What is 17 · 3?"),
        ]
        conversation = harmony.Conversation.from_messages(messages)
        ids = encoding.render_conversation_for_completion(conversation, harmony.Role.ASSISTANT)
        assert llm.chat_prompt(CONVERSATIONS[0], **plan.template_kwargs) == encoding.decode(ids)


def tekken(path: Path, values: list[str], default: str) -> Path:
    """A file of mistral-common's tokenizer, version 15, with a vocabulary of bytes."""
    from mistral_common.tokens.tokenizers.base import SpecialTokens

    names = list(dict.fromkeys(["<unk>", "<s>", "</s>", *(token.value for token in SpecialTokens)]))
    contents = {
        "config": {
            "pattern": "[^ ]+| ",
            "num_vocab_tokens": 256,
            "default_vocab_size": 256 + len(names),
            "default_num_special_tokens": len(names),
            "version": "v15",
        },
        "vocab": [
            {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
            for byte in range(256)
        ],
        "special_tokens": [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)],
        "model_settings_builder": {
            "reasoning_effort": {"type": "enum", "accepts_none": True, "values": values, "default": default}
        },
    }
    path.write_text(json.dumps(contents))
    return path


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["none", "high"], "none none ^high ^high high high high"),
        (list(EFFORTS), " ".join(EFFORTS)),
        (["low", "medium", "max"], "^low ^low low medium medium ^max max"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_mistral(values: list[str], words: str, tmp_path: Path, models: Callable[[str], ft.LLM]) -> None:
    """The template that mistral-common generates gives the text and settings that its tokenizer encodes."""
    pytest.importorskip("mistral_common")
    from mistral_common.exceptions import InvalidRequestException
    from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    file = tekken(tmp_path / "tekken.json", values, values[0])
    tokenizer = MistralTokenizer.from_file(file)
    template = convert_tokenizer_to_chat_template(file, use_special_token_variables=False)
    case = Case("mistral", "Mistral", levels=levels("reasoning_effort", words))
    llm = models(template)
    for effort in EFFORTS:
        plan = resolve_effort(tokenizer, effort, max_tokens=MAX_TOKENS)
        assert plan.template_kwargs == case.variables(effort), effort
        assert plan.budget == case.limit(effort), effort
        ours = resolve_effort(llm, effort, max_tokens=MAX_TOKENS)
        assert (ours.template_kwargs, ours.budget, ours.level) == (plan.template_kwargs, plan.budget, plan.level)
        assert (ours.system_suffix, plan.system_suffix) == (None, None)
        for messages in (CONVERSATIONS[0], WITH_SYSTEM):
            encoded = tokenizer.encode_chat_completion(ChatCompletionRequest(messages=messages, **plan.template_kwargs))
            text = tokenizer.decode(encoded.tokens, special_token_policy=SpecialTokenPolicy.KEEP)
            assert llm.chat_prompt(messages, **ours.template_kwargs) == text
        if effort not in values:
            refused = ChatCompletionRequest(messages=CONVERSATIONS[0], reasoning_effort=effort)
            with pytest.raises(InvalidRequestException):
                tokenizer.encode_chat_completion(refused)


def test_mistral_before_v15() -> None:
    """Older tokenizers refuse the field; those without thinking tokens are refused by us, too."""
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral")
    tokenizer = mistral.MistralTokenizer.v3(is_tekken=True)
    with pytest.raises(ft.UnsupportedError, match="knows no thinking"):
        resolve_effort(tokenizer, "high", max_tokens=MAX_TOKENS)
    assert resolve_effort(tokenizer, "none").template_kwargs == {}


def test_the_command_line_refuses_and_obeys(smollm2: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "farthing", "generate", str(smollm2), "-p", "Hello", "-n", "2", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    done = run("--effort", "low")
    assert done.returncode == 3
    assert "knows no thinking" in done.stderr
    done = run("--effort", "none", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["effort"]["effort"] == "none"
    done = run("--effort", "none", "--raw")
    assert done.returncode == 3
    assert "raw text" in done.stderr
