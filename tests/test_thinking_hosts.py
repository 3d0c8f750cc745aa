"""Thinking budgets in other hosts: transformers' generate, and vLLM's logits processors."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import farthing as ft
import numpy as np
import pytest
import tiny
from conftest import MODELS, ROOT
from farthing.reasoning import Controller, Policy, ThinkSpec
from farthing.reasoning.hosts import Rows
from farthing.reasoning.remote import RemoteAnswer, two_phase
from farthing.reasoning.vllm import _Processor, wanted

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SPECIAL = ["<s>", "</s>", "<think>", "</think>", "<|im_start|>", "<|im_end|>"]
OPEN, CLOSE = SPECIAL.index("<think>"), SPECIAL.index("</think>")
HARD: dict[str, Any] = {"grace": 0, "ramp": None, "loop_guard": False}
# Qwen's own wording stays with Qwen: the form of its template, in ours.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """For tiny models threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A transformers tokenizer of bytes with the special tokens of Qwen3."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="</s>", padding_side="left"
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny random Qwen3."""
    directory = tiny.build(tiny.Tiny("qwen3-thinking", "Qwen3Config", {"head_dim": 16}), tmp_path_factory.mktemp("q"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    loaded.generation_config.update(eos_token_id=SPECIAL.index("<|im_end|>"), pad_token_id=SPECIAL.index("</s>"))
    return loaded


def spans(ids: list[int], opened: bool = True) -> tuple[list[int], list[int]]:
    """Thinking and what is behind it."""
    if not opened:
        return [], ids
    end = ids.index(CLOSE) if CLOSE in ids else len(ids)
    return ids[:end], ids[end + 1 :]


def prompts(tokenizer: Any, *texts: str) -> Any:
    return tokenizer(
        [f"<|im_start|>user\n{text}<|im_end|>\n<think>" for text in texts], padding=True, return_tensors="pt"
    )


TEXTS = ("What is 2 + 2?", "Hello", "Why is the sky blue, and the sun not?", "x")


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("budget", [0, 7, 24])
def test_a_batch_keeps_its_budget(model: Any, tokenizer: Any, budget: int, sample: bool) -> None:
    """Left padding, other processors beside it, and the same text alone and in the batch."""
    batch = prompts(tokenizer, *TEXTS)
    steer = ft.hf.ThinkingLogitsProcessor(tokenizer, Policy(budget=budget, message="So: ", **HARD), max_new_tokens=400)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": sample, "repetition_penalty": 1.1}
    if sample:
        options |= {"temperature": 1.5, "top_k": 50, "top_p": 0.95}
    torch.manual_seed(0)
    tokens = model.generate(**batch, **options, logits_processor=[steer])
    written = tokens[:, batch.input_ids.shape[1] :].tolist()
    message = tokenizer.encode("So: ")
    for ids, report in zip(written, steer.reports(tokens), strict=True):
        thinking, answer = spans(ids)
        forced = thinking[-len(message) :] == message and report.stop == "budget"
        drawn = len(thinking) - len(message) * forced
        assert drawn <= budget
        assert (report.thinking_tokens, report.stop) == (drawn, "budget" if forced else "natural")
        assert report.forced_tokens >= (len(message) + 1) * forced
        assert CLOSE in ids
        assert answer
    if not sample:
        for row, text in enumerate(TEXTS):
            alone = prompts(tokenizer, text)
            one = ft.hf.ThinkingLogitsProcessor(
                tokenizer, Policy(budget=budget, message="So: ", **HARD), max_new_tokens=400
            )
            ids = model.generate(**alone, **options, logits_processor=[one])[0, alone.input_ids.shape[1] :].tolist()
            assert ids == written[row][: len(ids)]


def test_the_hard_budget_in_one_word(model: Any, tokenizer: Any) -> None:
    batch = prompts(tokenizer, *TEXTS)
    steer = ft.hf.ThinkingLogitsProcessor(tokenizer, thinking_budget=9)
    tokens = model.generate(**batch, max_new_tokens=120, do_sample=False, logits_processor=[steer])
    reports = steer.reports(tokens)
    assert {report.stop for report in reports} <= {"budget", "natural"}
    assert max(report.thinking_tokens for report in reports) == 9
    # The same object serves further calls, with other prompts.
    alone = prompts(tokenizer, "Something else altogether")
    (report,) = steer.reports(model.generate(**alone, max_new_tokens=120, do_sample=False, logits_processor=[steer]))
    assert report.thinking_tokens <= 9


def test_beams_take_their_thinking_along(model: Any, tokenizer: Any) -> None:
    batch = prompts(tokenizer, *TEXTS[:2])
    policy = Policy(budget=6, message="", **HARD)
    steer = ft.hf.ThinkingLogitsProcessor(tokenizer, policy)
    tokens = model.generate(
        **batch, max_new_tokens=24, num_beams=4, num_return_sequences=4, do_sample=False, logits_processor=[steer]
    )
    for ids in tokens[:, batch.input_ids.shape[1] :].tolist():
        thinking, _ = spans(ids)
        assert len(thinking) <= 6
        assert CLOSE in ids


@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_assisted_generation_says_the_same(model: Any, tokenizer: Any, way: str) -> None:
    batch = prompts(tokenizer, "aaaa bbbb aaaa bbbb aaaa bbbb")
    options: dict[str, Any] = {"max_new_tokens": 48, "do_sample": False}
    plain = model.generate(
        **batch, **options, logits_processor=[ft.hf.ThinkingLogitsProcessor(tokenizer, thinking_budget=11)]
    )
    help_ = {"prompt_lookup_num_tokens": 5} if way == "prompt lookup" else {"assistant_model": model}
    steer = ft.hf.ThinkingLogitsProcessor(tokenizer, thinking_budget=11)
    assert model.generate(**batch, **options, **help_, logits_processor=[steer]).tolist() == plain.tolist()


def test_two_phases_say_the_same(model: Any, tokenizer: Any) -> None:
    """Thinking cut by the criterion, its end appended, the answer generated: the processor's text."""
    batch = prompts(tokenizer, TEXTS[2])
    steer = ft.hf.ThinkingLogitsProcessor(tokenizer, thinking_budget=13)
    whole = model.generate(**batch, max_new_tokens=130, do_sample=False, logits_processor=[steer])
    assert steer.reports(whole)[0].stop == "budget"
    stop = ft.hf.ThinkingStoppingCriteria(tokenizer, thinking_budget=13)
    first = model.generate(**batch, max_new_tokens=130, do_sample=False, stopping_criteria=[stop])
    assert first.shape[1] == batch.input_ids.shape[1] + 13
    closed = torch.cat([first, torch.tensor([stop.close])], 1)
    left = 130 - (closed.shape[1] - batch.input_ids.shape[1])
    second = model.generate(closed, attention_mask=torch.ones_like(closed), max_new_tokens=left, do_sample=False)
    assert second.tolist() == whole.tolist()


def test_an_effort_makes_prompt_and_budget(model: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}]

    def ask(effort: str) -> tuple[str, Any]:
        steer = ft.hf.ThinkingLogitsProcessor(tokenizer, effort=effort, max_new_tokens=320)
        plan = steer.plan
        text = tokenizer.apply_chat_template(
            plan.conversation(messages), tokenize=False, add_generation_prompt=True, **plan.template_kwargs
        )
        if effort != "none":
            text += "<think>"  # a random model would not begin by itself
        batch = tokenizer(text, return_tensors="pt")
        tokens = model.generate(**batch, max_new_tokens=320, do_sample=False, logits_processor=[steer])
        return text, (steer, tokens)

    text, (steer, tokens) = ask("none")
    assert text.endswith("<think>\n\n</think>\n\n")
    with pytest.raises(ft.UnsupportedError, match="without a budget"):
        steer.reports(tokens)
    text, (steer, tokens) = ask("low")
    assert steer.plan.system_suffix in text
    assert steer.plan.budget == 8 == (320 - 256) // 8
    assert steer.reports(tokens)[0].thinking_tokens <= 8
    text, (steer, tokens) = ask("max")
    assert steer.plan.system_suffix is None
    assert steer.plan.budget == 51
    assert steer.reports(tokens)[0].thinking_tokens <= 51
    with pytest.raises(ft.UnsupportedError, match="max_tokens of at least"):
        ft.hf.ThinkingLogitsProcessor(tokenizer, effort="low", max_new_tokens=64)


def test_wrong_arguments(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="expected a policy, a thinking_budget or an effort"):
        ft.hf.ThinkingLogitsProcessor(tokenizer)
    with pytest.raises(ValueError, match="budget"):
        ft.hf.ThinkingLogitsProcessor(tokenizer, thinking_budget=-1)
    assert ft.hf.ThinkingLogitsProcessor.supports_continuous_batching is False


@pytest.fixture(scope="module")
def smollm2_peer() -> tuple[Any, Any]:
    path = MODELS / "smollm2-f32"
    if not path.is_dir():
        pytest.skip("opt-in: FARTHING_MODELS with smollm2-f32")
    return (
        transformers.AutoModelForCausalLM.from_pretrained(path).eval(),
        transformers.AutoTokenizer.from_pretrained(path),
    )


def test_a_real_tokenizer(smollm2_peer: tuple[Any, Any]) -> None:
    """SmolLM2, whose vocabulary has no markers: they are cut into several tokens, as the text has them."""
    model, tokenizer = smollm2_peer
    with pytest.raises(ft.UnsupportedError, match="knows no thinking"):
        ft.hf.ThinkingLogitsProcessor(tokenizer, effort="low", max_new_tokens=400)
    policy = Policy(start="<think>", end="</think>", **HARD)
    steer = ft.hf.ThinkingLogitsProcessor(tokenizer, policy, effort="minimal", max_new_tokens=400)
    assert steer.plan is not None
    assert steer.plan.budget == (400 - 256) // 16
    messages = [{"role": "user", "content": "Ann has 3 apples and buys 4 more. How many apples does she have?"}]
    text = tokenizer.apply_chat_template(
        steer.plan.conversation(messages), tokenize=False, add_generation_prompt=True, **steer.plan.template_kwargs
    )
    assert steer.plan.system_suffix in text
    batch = tokenizer(text + "<think>Ann begins", return_tensors="pt", add_special_tokens=False)
    tokens = model.generate(**batch, max_new_tokens=72, do_sample=False, logits_processor=[steer])
    answer = tokenizer.decode(tokens[0, batch.input_ids.shape[1] :])
    thinking, _, said = answer.partition("</think>")
    (report,) = steer.reports(tokens)
    assert report.stop == "budget"
    opened = len(tokenizer.encode("Ann begins", add_special_tokens=False))
    assert report.thinking_tokens + opened == steer.plan.budget, "what the prompt opened counts, too"
    assert thinking
    assert said.strip()


# Rows of any host.


def test_rows_are_known_by_what_they_say() -> None:
    spec = ThinkSpec(starts=[[1]], ends=[[2]], forced_close=[7, 2])
    made: list[list[int]] = []

    def make(prompt: Any) -> Controller:
        made.append(prompt.tolist())
        return Controller(spec, Policy(budget=50, **HARD), prompt.tolist(), 500)

    def fresh(prompt: int, ids: Any) -> Controller:
        controller = Controller(spec, Policy(budget=50, **HARD), ids[:prompt].tolist(), 500)
        controller.extend(ids[prompt:].tolist())
        return controller

    def check(rows: Rows, texts: list[Any], prompt: int) -> None:
        for controller, ids in zip(rows.follow(texts), texts, strict=True):
            expected = fresh(prompt, ids)
            assert (
                controller.state,
                controller.thinking_tokens,
                controller.forced_tokens,
                controller.answer_tokens,
            ) == (
                expected.state,
                expected.thinking_tokens,
                expected.forced_tokens,
                expected.answer_tokens,
            )

    random = np.random.default_rng(0)
    rows = Rows(make)
    texts = [np.array([1, 3 + row]) for row in range(4)]
    check(rows, texts, 2)
    for step in range(120):
        parents = random.integers(0, 4, 4) if step % 3 == 0 else range(4)  # beams
        texts = [np.append(texts[parent], random.integers(1, 9)) for parent in parents]
        check(rows, texts, 2)
    assert len(made) == 4, "known rows are not made again"
    for back in (1, 3, 30, 100):  # drafts that were rejected, further and further back
        texts = [np.append(ids[: len(ids) - back], 5) for ids in texts]
        if len(texts[0]) > 2:
            check(rows, texts, 2)
    made.clear()
    check(rows, [np.array([1, 3, 4, 4])], 4)
    assert made == [[1, 3, 4, 4]], "a text that continues none is a prompt"
    check(rows, [np.array([1, 3, 4, 4, 6])], 4)
    made.clear()
    check(rows, [np.array([1, 3, 4, 4])], 4)
    check(rows, [np.array([1, 3, 4, 4, 6, 6, 6])], 7)
    assert made[-1] == [1, 3, 4, 4, 6, 6, 6], "more than one token behind is a prompt, too"


def test_two_requests_to_a_server() -> None:
    asked_for: list[tuple[str, int, list[str]]] = []

    def server(*answers: tuple[str, str]) -> Any:
        replies = iter(answers)

        def complete(prompt: str, max_tokens: int, stop: Any) -> tuple[str, str]:
            asked_for.append((prompt, max_tokens, list(stop)))
            return next(replies)

        return complete

    options: dict[str, Any] = {"thinking_budget": 30, "max_tokens": 100, "message": " So:\n"}
    found = two_phase(server(("I add", "length"), ("7", "stop")), "3 + 4?<think>", **options)
    assert found == RemoteAnswer("I add", "7", cut=True, truncated=False)
    assert asked_for == [
        ("3 + 4?<think>", 30, ["</think>"]),
        ("3 + 4?<think>I add So:\n</think>\n\n", 70, []),
    ]
    found = two_phase(server(("It is 7.", "stop"), ("7 and", "length")), "3 + 4?<think>", **options)
    assert found == RemoteAnswer("It is 7.", "7 and", cut=False, truncated=True)
    assert asked_for[-1][0] == "3 + 4?<think>It is 7.</think>\n\n"
    with pytest.raises(ValueError, match="max_tokens: got 30, expected an integer ≥ 31"):
        two_phase(server(), "", thinking_budget=30, max_tokens=30)


@pytest.mark.parametrize("name", ["effort", "remote"])
def test_documentation_runs(name: str) -> None:
    assert doctest.testmod(import_module(f"farthing.reasoning.{name}")).attempted > 0


# vLLM: its interfaces, restated; the host itself below.


class Direction(Enum):
    UNIDIRECTIONAL = 0
    SWAP = 1


def asked(**extra: Any) -> SimpleNamespace:
    return SimpleNamespace(extra_args=extra or None, max_tokens=1000)


@pytest.fixture
def processor(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(_Processor, "_tokenizer", lambda _: tokenizer)
    config = SimpleNamespace(model_config=SimpleNamespace())
    return lambda *host: _Processor(config, *(host or (torch.device("cpu"), False)))


def test_vllm_options_are_checked() -> None:
    assert wanted(asked()) is None
    assert wanted(asked(other=1)) is None
    assert wanted(asked(thinking_budget=5)).budget == 5
    assert wanted(asked(thinking={"budget": 9, "ramp": None})).budget == 9
    assert wanted(asked(thinking='{"budget": 9}')).budget == 9
    for extra, message in [
        ({"thinking_budget": -1}, "an integer ≥ 0"),
        ({"thinking_budget": True}, "an integer ≥ 0"),
        ({"thinking_budget": "5"}, "an integer ≥ 0"),
        ({"thinking": 5}, "a dict"),
        ({"thinking": "budget=5"}, "expected JSON"),
        ({"thinking": {"bugdet": 5}}, "bugdet"),
        ({"thinking": {"budget": -5}}, "budget"),
        ({"thinking_token_budget": 5}, "expected thinking_budget"),
        ({"reasoning_effort": "low"}, "resolve_effort"),
    ]:
        with pytest.raises(ValueError, match=message):
            _Processor.validate_params(asked(**extra))


def test_vllm_v1_rows_come_go_and_move(processor: Callable[..., Any], tokenizer: Any) -> None:
    steer = processor()
    outputs: list[list[int]] = [[], [], []]
    prompt = [OPEN, 20]
    update = SimpleNamespace(
        batch_size=3,
        removed=[],
        added=[
            (0, asked(thinking_budget=4), prompt, outputs[0]),
            (1, asked(), prompt, outputs[1]),
            (2, asked(thinking={"budget": 2, "message": "", **HARD}), prompt, outputs[2]),
        ],
        moved=[],
    )
    steer.update_state(update)
    assert steer.is_argmax_invariant() is False

    def forced() -> list[int | None]:
        logits = torch.zeros(3, 262)
        out = steer.apply(logits)
        finite = [torch.isfinite(row).nonzero().flatten().tolist() for row in out]
        return [ids[0] if len(ids) == 1 else None for ids in finite]

    assert forced() == [None, None, None]
    for output in outputs:
        output.append(30)
    steer.update_state(None)
    assert forced() == [None, None, CLOSE]
    outputs[2].append(-1)  # on its way, as under asynchronous scheduling
    assert forced() == [None, None, CLOSE]
    outputs[2][-1:] = [CLOSE, *tokenizer.encode("\n\n")]
    swap = SimpleNamespace(removed=[1], added=[], moved=[(2, 1, Direction.UNIDIRECTIONAL), (0, 1, Direction.SWAP)])
    steer.update_state(swap)
    outputs[0] += [31, 32]
    first = forced()
    assert first[0] is None
    assert first[1] is not None, "the first request moved to row 1, and its budget is spent"
    # A request that comes back after preemption brings its output along.
    steer.update_state(
        SimpleNamespace(removed=[0, 1], added=[(0, asked(thinking_budget=4), prompt, [30, 31, 32])], moved=[])
    )
    assert forced() == [first[1], None, None]


def test_vllm_v2_rows_of_drafts(processor: Callable[..., Any]) -> None:
    tokens = torch.zeros(4, 32, dtype=torch.int32)
    states = SimpleNamespace(
        all_token_ids=SimpleNamespace(gpu=tokens), prompt_len=SimpleNamespace(np=np.array([0, 2, 0, 2]))
    )
    steer = processor(states)
    assert steer.add_request(1, asked(thinking={"budget": 4, "message": "", **HARD})) is True
    assert steer.add_request(3, asked()) is False
    tokens[1, :4] = torch.tensor([OPEN, 20, 21, 22])
    steer.apply_staged_writes()

    def allowed(rows: list[tuple[int, int, int, int]]) -> list[int]:
        """Number of tokens that each row (slot, position among its drafts, input token, position) may draw."""
        slot, local, ids, position = (torch.tensor(column) for column in zip(*rows, strict=True))
        ctx = SimpleNamespace(expanded_idx_mapping=slot, expanded_local_pos=local, input_ids=ids, pos=position)
        return torch.isfinite(steer.apply(torch.zeros(len(rows), 262), ctx)).sum(1).tolist()

    everything = 262
    # Three thinking tokens are committed (20, 21, 22), one more is drafted: behind it the end is dictated.
    found = allowed([(3, 0, 9, 3), (1, 1, 23, 4), (1, 0, 22, 3)])
    assert found[0] == everything
    assert found[1] == 1
    assert found[2] > 1
    # The draft was rejected, and another token committed.
    tokens[1, 4] = 40
    assert allowed([(1, 0, 40, 4)]) == [1]
    # The slot's next occupant wants nothing; a part of a prompt draws nothing.
    assert steer.add_request(1, asked()) is False
    assert allowed([(1, 0, 40, 4)]) == [everything]
    assert steer.add_request(1, asked(thinking_budget=0)) is True
    assert allowed([(1, 0, OPEN, 0)]) == [everything]


VLLM = """
import os, sys
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR"
)
from vllm import LLM, SamplingParams

llm = LLM(
    sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=4, gpu_memory_utilization=0.1,
    logits_processors=["farthing.vllm:ThinkingProcessor"],
)
hard = {"start": "<think>", "end": "</think>", "message": "", "grace": 0, "ramp": None, "loop_guard": False}
def params(**extra):
    return SamplingParams(temperature=0, max_tokens=64, extra_args=extra or None)

prompt = "Question: what is 3 + 4? Think first.\\n<think>\\n"
wishes = [params(thinking=hard | {"budget": 12}), params(), params(thinking_budget=20, thinking=hard)]
tokenizer = llm.get_tokenizer()
for output in llm.generate([prompt] * 3, wishes, use_tqdm=False):
    text = output.outputs[0].text
    thinking, end, _ = text.partition("</think>")
    print(len(tokenizer.encode(thinking)) if end else "open")
try:
    llm.generate([prompt], params(thinking_token_budget=5), use_tqdm=False)
except Exception as error:
    print("refused" if "thinking_budget" in str(error) else error)
"""


def test_vllm_itself(smollm2_peer: tuple[Any, Any], tmp_path: Path) -> None:
    """In the host, where it is installed."""
    pytest.importorskip("vllm")
    del smollm2_peer
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    command = [sys.executable, "-c", VLLM, str(MODELS / "smollm2-f32")]
    ran = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    lines = ran.stdout.splitlines()[-4:]
    assert len(lines) == 4, ran.stderr[-2000:]
    # The line break that the prompt opened the thinking with counts, too.
    assert [lines[0], lines[2], lines[3]] == ["11", "19", "refused"], ran.stderr[-2000:]
    assert lines[1] == "open" or int(lines[1]) > 20
