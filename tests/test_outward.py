"""Drafters in transformers, vLLM and llama-cpp-python: the host's own text in fewer passes, whatever they propose."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import farthing as ft
import numpy as np
import pytest
import reference
import tiny
import torch
import transformers
from conftest import ROOT
from farthing.llama_cpp import DrafterModel
from farthing.speculative import Composed, NGram, Suffix, SuffixStore, TokenRecycling, check
from farthing.speculative.host import Chain
from farthing.speculative.pace import Pace, PassTimes, Survival
from farthing.vllm import DrafterProposer

PROMPTS = (
    "Repeat this list twice: apples, pears, plums, cherries, grapes. Apples, pears,",
    "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n    return",
    "The capital of France is",
)


class Echo:
    """Proposes what the text began with."""

    def draft(self, request, tokens, budget):
        return tokens[:budget].tolist()


class Random:
    """Proposes anything that exists."""

    def __init__(self, vocabulary: int) -> None:
        self.rng, self.vocabulary = np.random.default_rng(0), vocabulary

    def draft(self, request, tokens, budget):
        return self.rng.integers(self.vocabulary, size=budget)


class Oracle:
    """Proposes what was said the last time."""

    def __init__(self, said: list[int]) -> None:
        self.said = said

    def draft(self, request, tokens, budget):
        return self.said[len(tokens) : len(tokens) + budget]


class Tree:
    """Proposes what was said the last time, and a wrong twig beside it."""

    def __init__(self, said: list[int]) -> None:
        self.said = said

    def draft(self, request, tokens, budget):
        first, *others = self.said[len(tokens) : len(tokens) + budget - 1] or [0]
        return [first, 0, *others], [-1, -1, 0, *range(2, len(others) + 1)][: len(others) + 2]


class Raises:
    def draft(self, request, tokens, budget):
        raise RuntimeError("out of ideas")


class Garbage:
    def draft(self, request, tokens, budget):
        return [10**6] * budget


class Slow:
    def __init__(self) -> None:
        self.asked = 0

    def draft(self, request, tokens, budget):
        self.asked += 1
        time.sleep(0.005)
        return [int(tokens[0])] * budget


@pytest.fixture
def passes() -> Iterator[Callable[[torch.nn.Module], list[int]]]:
    """Rows of each pass of a model from now on."""
    handles = []

    def count(model: torch.nn.Module) -> list[int]:
        rows: list[int] = []
        handles.append(
            model.register_forward_pre_hook(
                lambda _, __, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
            )
        )
        return rows

    yield count
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def model(tiny_directory: Callable[[str], Path]) -> transformers.PreTrainedModel:
    return reference.load(tiny_directory("smollm2")).eval()


@pytest.fixture(scope="module")
def ids(model: transformers.PreTrainedModel) -> torch.Tensor:
    return torch.tensor([tiny.prompt(20, model.config.vocab_size) * 2])


def generated(model: transformers.PreTrainedModel, ids: torch.Tensor, **options) -> list[int]:
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()


@pytest.mark.parametrize("draft_tokens", [None, 1, 4, 8])
@pytest.mark.parametrize(
    "drafter",
    [
        None,
        Suffix(SuffixStore()),
        Suffix(tree=True),
        NGram("transformers"),
        NGram("vllm", min_n=1, max_n=3),
        TokenRecycling(),
        Composed(Suffix(min_match=2), TokenRecycling()),
        Echo(),
        Random(100),
    ],
    ids=lambda drafter: getattr(drafter, "name", type(drafter).__name__),
)
def test_greedy_text_is_the_hosts(model, ids, drafter, draft_tokens) -> None:
    plain = generated(model, ids, min_new_tokens=40)
    options = {"custom_generate": ft.hf.generate, "drafter": drafter, "draft_tokens": draft_tokens}
    for _ in range(2):
        assert generated(model, ids, min_new_tokens=40, **options) == plain


@pytest.mark.parametrize("drafter", [Oracle, Tree])
def test_right_drafts_save_passes(model, ids, passes, drafter) -> None:
    plain = generated(model, ids, min_new_tokens=40)
    rows = passes(model)
    options = {"custom_generate": ft.hf.generate, "drafter": drafter(plain), "draft_tokens": 4}
    assert generated(model, ids, min_new_tokens=40, **options) == plain
    # Five tokens a pass with the oracle; one draft of four is the wrong twig.
    assert rows == [43 + 1, *[5] * 7] if drafter is Oracle else [43, *[4] * 8, 3, 1]


def test_copies_are_accepted(model, ids, passes) -> None:
    """What a request said is in the store for the next one."""
    drafter = Suffix(SuffixStore())
    rows = passes(model)
    options = {"custom_generate": ft.hf.generate, "drafter": drafter, "draft_tokens": 7}
    first = generated(model, ids, min_new_tokens=40, **options)
    before = len(rows)
    assert generated(model, ids, min_new_tokens=40, **options) == first
    assert len(rows) - before <= 12


def test_tokens_of_all_rows_teach_token_recycling(model, ids, passes) -> None:
    drafter = TokenRecycling()
    options = {"custom_generate": ft.hf.generate, "drafter": drafter, "draft_tokens": 3}
    plain = generated(model, ids, min_new_tokens=40)
    generated(model, ids, min_new_tokens=40, **options)
    rows = passes(model)
    assert generated(model, ids, min_new_tokens=40, **options) == plain
    assert len(rows) < 30


def test_texts_end_where_the_hosts_do(model, ids) -> None:
    """At an EOS token in the middle of a draft, at a maximal length, with processors that look back, with scores."""
    plain = generated(model, ids, min_new_tokens=40)
    oracle = {"custom_generate": ft.hf.generate, "drafter": Oracle(plain), "draft_tokens": 7}
    for options in (
        {"eos_token_id": plain[ids.shape[1] + 10]},
        {"eos_token_id": [plain[ids.shape[1] + 3], plain[ids.shape[1] + 12]]},
        {"max_new_tokens": 1},
        {"max_new_tokens": 6},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"bad_words_ids": [[plain[ids.shape[1] + 2]]], "min_new_tokens": 12},
    ):
        assert generated(model, ids, **options, **oracle) == generated(model, ids, **options)
    more = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 9, "do_sample": False}
    mask = torch.ones_like(ids)
    wanted = model.generate(ids, attention_mask=mask, pad_token_id=0, **more)
    got = model.generate(ids, attention_mask=mask, pad_token_id=0, **more, **oracle)
    assert torch.equal(got.sequences, wanted.sequences)
    assert len(got.scores) == len(wanted.scores)
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(wanted.scores), rtol=1e-4, atol=1e-4)


def test_candidates_end_before_eos_and_maximal_length() -> None:
    text = torch.tensor([[5, 6, 7, 8, 9, 5, 6]])
    make = ft.hf.FarthingCandidateGenerator
    for options, wanted in (
        ({}, [7, 8, 9, 5, 6]),
        ({"eos_token_ids": [9]}, [7, 8]),
        ({"eos_token_ids": [7]}, []),
        ({"max_length": 10}, [7, 8]),
        ({"max_length": 8}, []),
        ({"vocabulary": 10}, [7, 8, 9, 5, 6]),
    ):
        got, logits = make(NGram("transformers"), draft_tokens=5, **options).get_candidates(text)
        assert got[0, 7:].tolist() == wanted
        assert got.dtype == text.dtype
        assert logits is None


def test_what_the_hosts_loop_cannot_do_is_an_error(model, ids) -> None:
    both = ids.repeat(2, 1)
    for wrong, options, message in (
        (both, {}, "batch of 2"),
        (ids, {"num_return_sequences": 2, "do_sample": True}, "batch of 2|num_return_sequences"),
        (ids, {"num_beams": 2}, "batch of 2|beams"),
        (ids, {"use_cache": False}, "use_cache"),
        (ids, {"cache_implementation": "static"}, "static cache"),
        (ids, {"drafter": 7}, "drafter=7"),
    ):
        with pytest.raises(ft.UnsupportedError, match=message):
            generated(model, wrong, custom_generate=ft.hf.generate, **options)
    with pytest.raises(ValueError, match="draft_tokens"):
        generated(model, ids, custom_generate=ft.hf.generate, draft_tokens=0)
    with pytest.raises(ft.UnsupportedError, match="batch of 2"):
        ft.hf.FarthingCandidateGenerator().get_candidates(both)


@pytest.mark.parametrize("drafter", [Raises(), Garbage()], ids=["raises", "garbage"])
def test_a_broken_drafter_costs_a_warning(model, ids, drafter) -> None:
    plain = generated(model, ids, min_new_tokens=40)
    for draft_tokens in (None, 4):
        options = {"custom_generate": ft.hf.generate, "drafter": drafter, "draft_tokens": draft_tokens}
        with pytest.warns(RuntimeWarning, match="asked no more in transformers") as caught:
            assert generated(model, ids, min_new_tokens=40, **options) == plain
        assert len(caught) == 1


def test_a_slow_drafter_is_asked_less_and_less(model, ids) -> None:
    plain = generated(model, ids, min_new_tokens=60, max_new_tokens=60)
    slow = Slow()
    options = {"custom_generate": ft.hf.generate, "drafter": slow, "min_new_tokens": 60, "max_new_tokens": 60}
    assert generated(model, ids, **options) == plain
    assert slow.asked < 20


def test_smollm2_greedy_text_is_the_hosts(smollm2: Path, passes) -> None:
    """Real weights, real text."""
    model = reference.gguf_model(smollm2)
    tokenizer = ft.LLM(smollm2).tokenizer
    rows = passes(model)
    tokens = plain_passes = 0
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        plain = generated(model, ids, max_new_tokens=32, eos_token_id=2)
        tokens += len(plain) - ids.shape[1]
        plain_passes += len(rows)
        for options in ({}, {"drafter": NGram("vllm", min_n=2, max_n=4), "draft_tokens": 5}):
            assert (
                generated(model, ids, max_new_tokens=32, eos_token_id=2, custom_generate=ft.hf.generate, **options)
                == plain
            )
        rows.clear()
        # Said before: the store knows it.
        assert (
            generated(model, ids, max_new_tokens=32, eos_token_id=2, custom_generate=ft.hf.generate, draft_tokens=8)
            == plain
        )
        assert len(rows) < 16
        rows.clear()


def test_the_law_of_drawn_text_stays(monkeypatch) -> None:
    """The host's loop over our candidates, held to a table of laws by our own tester."""
    config = transformers.LlamaConfig(
        vocab_size=6,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    laws: list[np.ndarray] = []

    def forward(*_, input_ids, past_key_values, **__):
        """One row of the table behind the prompt and behind each drafted token."""
        states = torch.zeros(1, 1, input_ids.shape[1], 8)
        past_key_values.update(states, states, 0)
        return transformers.modeling_outputs.CausalLMOutputWithPast(
            logits=torch.from_numpy(laws[0]).log()[None], past_key_values=past_key_values
        )

    model.forward = forward
    once = transformers.StoppingCriteriaList([lambda ids, _, **__: torch.ones(len(ids), dtype=torch.bool)])
    prompt = torch.tensor([[0]])
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}

    def hosted(p, tokens, seed):
        laws[:] = [p]
        torch.manual_seed(seed)
        text = model.generate(
            prompt,
            stopping_criteria=once,
            custom_generate=ft.hf.generate,
            drafter=Oracle([0, *tokens.tolist()]),
            draft_tokens=len(tokens),
            **options,
        )
        return text[0, 1:].tolist()

    for draft in ("one-hot", "sampled"):
        report = check(hosted, draft=draft, length=2, vocabulary=6, draws=1500)
        assert report.verdict == "lossless", report
        assert max(case.mean_tokens for case in report.cases) > 1.1

    # So few draws find what would be wrong: candidates that are likeliest, with logits as if they had been drawn.
    candidates = ft.hf.FarthingCandidateGenerator.get_candidates

    def careless(p, q, tokens, seed):
        logits = torch.from_numpy(q).log()[None]
        with monkeypatch.context() as patch:
            name = "get_candidates"
            patch.setattr(ft.hf.FarthingCandidateGenerator, name, lambda self, ids: (candidates(self, ids)[0], logits))
            return hosted(p, tokens, seed)

    assert check(careless, draft="argmax", length=2, vocabulary=6, draws=1500).verdict == "biased"


# --- the length of drafts ---------------------------------------------------------------------------------------------


def replayed(cost: Callable[[int], float], truth: float, draft_seconds: float = 0.0) -> tuple[float, float, list[int]]:
    """Seconds for 600 tokens with drafts whose tokens are right that often, and without; and the last lengths."""
    rng = np.random.default_rng(1)
    pace = Pace(PassTimes(), Survival())
    seconds, tokens, lengths = 0.0, 0, []
    while tokens < 600:
        length, chain = 0, Chain()
        if pace.asks():
            chain = Chain([1] * 15, [3] * 15, [1.0] * 15)
            seconds += draft_seconds
            length = pace.choose(chain, draft_seconds)
        right = int(np.argmin(np.append(rng.random(15) < truth, False)))
        taken = min(right, length) + 1
        took = cost(length + 1)
        pace.passed(length + 1, took)
        pace.observe(chain, min(right, taken), taken)
        seconds, tokens = seconds + took, tokens + taken
        lengths.append(length)
    return seconds, tokens * cost(1), lengths[-20:]


def test_pace_takes_what_pays() -> None:
    flat, plain, lengths = replayed(lambda rows: 1 + 0.02 * (rows - 1), 0.9)
    assert flat < plain / 4
    assert np.median(lengths) >= 8


@pytest.mark.parametrize("truth", [0.0, 0.3, 0.6, 0.9])
def test_pace_never_loses_where_rows_cost_what_passes_do(truth: float) -> None:
    steep, plain, lengths = replayed(lambda rows: float(rows), truth)
    assert steep < 1.08 * plain
    assert np.median(lengths) == 0


def test_pace_looks_beyond_a_step() -> None:
    """Two rows do not pay, more do."""
    step, plain, lengths = replayed(lambda rows: 1.0 if rows == 1 else 1.7 + 0.03 * rows, 0.9)
    assert step < plain / 2.5
    assert np.median(lengths) >= 8


def test_pace_never_loses_to_wrong_drafts() -> None:
    wrong, plain, _ = replayed(lambda rows: 1 + 0.06 * (rows - 1), 0.0)
    assert wrong < 1.03 * plain
    slow, plain, _ = replayed(lambda rows: 1 + 0.06 * (rows - 1), 0.0, draft_seconds=0.5)
    assert slow < 1.05 * plain


def test_pass_times_are_of_the_last_passes() -> None:
    times = PassTimes()
    times.add(1, 9.0)
    assert times.curve(4) is None
    for seconds in (1.0, 1.2):
        times.add(1, seconds)
    assert times.curve(3) == [1.0, 1.0, np.inf]
    for seconds in (9.0, 2.0):
        times.add(5, seconds)
    times.add(3, 9.0)  # once only: it may have compiled something
    for _ in range(65):
        times.add(1, 1.0)
    assert times.curve(11) == pytest.approx([1.0, 1.25, 1.5, 1.75, *[2.0] * 6, np.inf])
    for _ in range(512):
        times.add(1, 1.5)
    assert times.known() == {1: 1.5}


# --- vLLM -------------------------------------------------------------------------------------------------------------


def vllm_config(most: int = 4, length: int = 64, rows: int = 8, vocabulary: int = 1000) -> SimpleNamespace:
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=most),
        model_config=SimpleNamespace(max_model_len=length, get_vocab_size=lambda: vocabulary),
        scheduler_config=SimpleNamespace(max_num_seqs=rows),
    )


class Lookup(DrafterProposer):
    def make_drafter(self):
        return NGram("vllm", min_n=1, max_n=4, max_tokens=9)


class Known(DrafterProposer):
    """Counts what its drafter is told."""

    def make_drafter(self):
        self.log: list[tuple[str, int]] = []
        proposer = self

        class Told(Echo):
            def begin(self, request, tokens):
                proposer.log.append(("begin", len(tokens)))

            def observe(self, request, tokens):
                proposer.log.append(("observe", len(tokens)))

            def end(self, request):
                proposer.log.append(("end", 0))

        return Told()


def lookup(text: list[int]) -> list[int]:
    drafter = NGram("vllm", min_n=1, max_n=4, max_tokens=9)
    drafter.begin(text)
    return drafter.draft(9).token_ids


def test_vllm_rows_may_change_places() -> None:
    """Rows join, leave, are permuted, and get several tokens at once; each draft is that of its own text."""
    rng = np.random.default_rng(0)
    proposer = Lookup(vllm_config())
    proposer.load_model(object())
    texts: list[list[int]] = []
    for step in range(60):
        if len(texts) < 6 and step % 3 == 0:
            texts.append(rng.integers(0, 4, size=rng.integers(1, 12)).tolist())
            texts[-1:] = [list(texts[-1]), list(texts[-1])]  # twins
        rng.shuffle(texts)
        ids = np.zeros((8, 64), np.int32)
        lengths = np.zeros(8, np.int32)
        sampled = []
        for row, text in enumerate(texts):
            new = rng.integers(0, 4, size=rng.integers(0, 4)).tolist()
            text += new
            ids[row, : len(text)] = text
            # Drafts of the last step lie behind the text.
            ids[row, len(text) : len(text) + 2] = 999
            lengths[row] = len(text)
            sampled.append(new)
        drafts = proposer.propose(sampled, lengths, ids, slot_mappings=None)
        assert len(drafts) == len(texts)
        for text, new, draft in zip(texts, sampled, drafts, strict=True):
            assert draft == (lookup(text)[:4] if new else [])
            assert all(type(token) is int for token in draft)
        texts = [text for text in texts if len(text) < 40]


def test_vllm_texts_are_told_what_is_new() -> None:
    """Not the whole text again, also after a permutation; and texts end where there are more than vLLM runs."""
    proposer = Known(vllm_config(rows=2))
    ids = np.zeros((2, 64), np.int32)
    ids[0, :5], ids[1, :7] = 1, 2
    assert proposer.propose([[1], [2]], np.array([5, 7]), ids) == [[1] * 4, [2] * 4]
    ids[0, :9], ids[1, :6] = 2, 1
    assert proposer.propose([[2, 2], [1]], np.array([9, 6]), ids) == [[2] * 4, [1] * 4]
    assert proposer.log == [("begin", 5), ("begin", 7), ("observe", 2), ("observe", 1)]
    ids[0, :4] = 3
    proposer.propose([[3], []], np.array([4, 6]), ids)
    assert proposer.log[4:] == [("begin", 4), ("end", 0)]


def test_vllm_drafts_end_with_the_model() -> None:
    ids = np.ones((3, 64), np.int32)
    drafts = Lookup(vllm_config()).propose([[1], [1], [1]], np.array([64, 63, 61]), ids)
    assert drafts == [[], [], [1, 1]]
    assert DrafterProposer(vllm_config()).propose([], np.zeros(0, np.int32), ids[:0]) == []


def test_vllm_a_broken_drafter_costs_a_warning() -> None:
    for broken in (Raises, Garbage):
        kind = type("Kind", (DrafterProposer,), {"make_drafter": lambda _, made=broken: made()})
        proposer = kind(vllm_config())
        ids = np.ones((2, 64), np.int32)
        with pytest.warns(RuntimeWarning, match="asked no more in vLLM") as caught:
            assert proposer.propose([[1], [1]], np.array([5, 6]), ids) == [[], []]
        assert proposer.propose([[1], [1]], np.array([6, 7]), ids) == [[], []]
        assert len(caught) == 1
    kind = type("Kind", (DrafterProposer,), {"make_drafter": lambda _: TokenRecycling()})
    with pytest.raises(ft.UnsupportedError, match="learns from logits"):
        kind(vllm_config())


REGISTER = """
import importlib.util, sys
import farthing.vllm
farthing.vllm.register_suffix_decoding()
farthing.vllm.register_suffix_decoding()
if importlib.util.find_spec("arctic_inference") is None:
    print("none")
else:
    importlib.import_module("arctic_inference")
    from arctic_inference.suffix_decoding import SuffixDecodingCache
    cache = SuffixDecodingCache(max_tree_depth=24, max_cached_requests=100)
    cache.start_request("a", [1, 2, 3, 4])
    cache.add_active_response("a", [1, 2])
    print(cache.speculate("a", [4, 1, 2], max_spec_tokens=4).token_ids)
"""


def registered(
    tmp_path: Path, value: str | None, script: str = REGISTER, *arguments: str, timeout: int = 60
) -> subprocess.CompletedProcess[str]:
    environment = {name: each for name, each in os.environ.items() if name != "FARTHING_VLLM_SUFFIX"}
    environment |= {} if value is None else {"FARTHING_VLLM_SUFFIX": value}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=timeout,
    )


def test_vllm_suffix_cache_is_registered_only_where_asked_for(tmp_path: Path) -> None:
    for value in (None, "0", ""):
        assert registered(tmp_path, value).stdout == "none\n"
    asked = registered(tmp_path, "1")
    assert asked.stdout == "[3, 4]\n"
    assert "farthing's cache" in asked.stderr
    (tmp_path / "arctic_inference").mkdir()
    (tmp_path / "arctic_inference" / "__init__.py").touch()
    assert "arctic_inference is installed" in registered(tmp_path, "1").stderr
    assert (
        'farthing_suffix_decoding = "farthing.vllm:register_suffix_decoding"' in (ROOT / "pyproject.toml").read_text()
    )


# --- llama-cpp-python -------------------------------------------------------------------------------------------------


def said_by_llama(prompt: list[int], after: Callable[[list[int]], int], draft_model: DrafterModel | None) -> list[int]:
    """The host's loop: draw behind each row while the next token is the one drafted."""
    text, drafted = list(prompt), []
    while len(text) < 80:
        rows, drafted = [*drafted], []
        while True:
            text.append(after(text))
            if not rows or rows.pop(0) != text[-1]:
                break
        if draft_model is not None:
            array = draft_model(np.array(text, np.intc))
            assert array.dtype == np.intc
            assert array.ndim == 1
            drafted = array.astype(int).tolist()
    return text[:80]


@pytest.mark.parametrize("draft_tokens", [None, 5])
def test_llama_cpp_text_is_the_hosts(draft_tokens) -> None:
    def after(text: list[int]) -> int:
        return (text[-1] * 3 + text[-2]) % 17

    plain = said_by_llama([3, 4], after, None)
    for drafter in (None, NGram("transformers"), Echo(), Random(17), Oracle(plain)):
        draft_model = DrafterModel(drafter, draft_tokens=draft_tokens)
        for _ in range(2):
            assert said_by_llama([3, 4], after, draft_model) == plain
        if draft_tokens and not isinstance(drafter, (Echo, Random)):
            assert draft_model.accepted > 0.5 * draft_model.drafted > 0


def test_llama_cpp_a_broken_drafter_costs_a_warning() -> None:
    for broken in (Raises(), Garbage()):
        draft_model = DrafterModel(broken, draft_tokens=4, vocabulary=100)
        with pytest.warns(RuntimeWarning, match="asked no more in llama-cpp-python"):
            assert draft_model(np.array([1, 2, 3], np.intc)).size == 0
        assert draft_model(np.array([1, 2, 3, 4], np.intc)).size == 0
    with pytest.raises(ft.UnsupportedError, match="learns from logits"):
        DrafterModel(TokenRecycling())
    with pytest.raises(ValueError, match="draft_tokens"):
        DrafterModel(draft_tokens=0)


def floats(source: Path, target: Path) -> Path:
    """A GGUF file with all its tensors in float32."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = entry.types[1] if entry.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, entry.contents(), entry.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_llama_cpp_itself(smollm2: Path, tmp_path: Path) -> None:
    """In the host, where it is installed (or its source on the path, with LLAMA_CPP_LIB_PATH).

    In float32: its 4-bit kernels give logits that differ by up to 0.7 between one row and several, so that its greedy
    text depends on drafts, its own lookup's too.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            llama_cpp = import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError):
        pytest.skip("needs llama-cpp-python")
    path = floats(smollm2, tmp_path / "smollm2.gguf")

    def said(draft_model: DrafterModel | None, prompt: str) -> str:
        llm = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, draft_model=draft_model, verbose=False)
        try:
            return llm.create_completion(prompt, max_tokens=32, temperature=0.0)["choices"][0]["text"]
        finally:
            llm.close()

    for prompt in PROMPTS:
        plain = said(None, prompt)
        for draft_model in (DrafterModel(), DrafterModel(NGram("transformers"), draft_tokens=4)):
            assert said(draft_model, prompt) == plain


VLLM = """
import os, sys
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR"
)
from vllm import LLM, SamplingParams

prompts = [{"prompt_token_ids": ids} for ids in eval(sys.argv[2])]
custom = {"method": "custom_class", "model": "farthing.vllm.DrafterProposer", "num_speculative_tokens": 4}
said = []
for speculation in (None, custom, {"method": "suffix", "num_speculative_tokens": 4}):
    llm = LLM(
        sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8, skip_tokenizer_init=True,
        speculative_config=speculation, gpu_memory_utilization=0.1,
    )
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32, detokenize=False), use_tqdm=False)
    said.append([list(output.outputs[0].token_ids) for output in outputs])
print(*("same" if each == said[0] else each for each in said))
"""


def test_vllm_itself(smollm2: Path, tmp_path: Path) -> None:
    """In the host, where it is installed with our entry point: both ways in, several texts at once."""
    pytest.importorskip("vllm")
    reference.gguf_model(smollm2).save_pretrained(tmp_path / "model")
    tokenizer = ft.LLM(smollm2).tokenizer
    prompts = repr([tokenizer.encode(prompt) for prompt in PROMPTS])
    ran = registered(tmp_path, "1", VLLM, str(tmp_path / "model"), prompts, timeout=280)
    assert ran.stdout.splitlines()[-1] == "same same same", ran.stderr[-2000:]


@pytest.mark.parametrize("name", ["vllm", "llama_cpp", "hf.generate"])
def test_documentation_runs(name: str, monkeypatch) -> None:
    monkeypatch.delenv("FARTHING_VLLM_SUFFIX", raising=False)
    results = doctest.testmod(import_module(f"farthing.{name}"))
    assert results.attempted > 0
    assert results.failed == 0


def test_modules_import_no_host() -> None:
    hosts = {"vllm", "llama_cpp", "torch", "transformers"}
    script = f"import farthing.vllm, farthing.llama_cpp, sys; print(sorted({hosts} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
