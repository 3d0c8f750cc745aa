"""Real weights: the default model, and larger ones where FARTHING_MODELS has them, beside transformers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import farthing as ft
import numpy as np
import pytest
import reference
from conftest import MODELS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a fisherman who",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "The three primary colours are",
    "In 1969, the first human being",
    "To bake bread you need flour,",
    "SELECT name, age FROM",
    "The difference between a virus and a bacterium is that",
    "Dear Sir or Madam,\n\nI am writing to",
    "Photosynthesis is the process by which",
    "1, 1, 2, 3, 5, 8, 13,",
    "Shakespeare wrote many plays, among them",
    "The best way to learn a language is to",
    "import numpy as np\n\ndef softmax(x):",
    "Die Hauptstadt von Deutschland ist",
    "An apple a day keeps",
    "The speed of light in a vacuum is about",
    "Q: What do bees make?\nA:",
    "My favourite season is autumn because",
]
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
FRANCE_CHAT = """
1 9690 198 2683 359 253 5356 5646 11173 3365 3511 308 34519 28 7018 411 407 19712 8182 2 198 1 4093 198 1780 314 260
3575 282 4649 47 2 198 1 520 9531 198
"""
FRANCE_CHAT_IDS = [int(token) for token in FRANCE_CHAT.split()]
FRANCE_IDS = [504, 3575, 282, 4649, 314]  # "The capital of France is"


@pytest.fixture(scope="module")
def model(smollm2: Path) -> PreTrainedModel:
    return reference.gguf_model(smollm2)


@pytest.fixture(scope="module")
def exact(smollm2: Path) -> ft.LLM:
    return ft.LLM(smollm2, weights="f32", context=2048, max_sequences=len(PROMPTS))


@pytest.fixture(scope="module")
def packed(smollm2: Path) -> ft.LLM:
    return ft.LLM(smollm2, context=2048)


def test_f32_logits_equal_transformers(model: PreTrainedModel, exact: ft.LLM, text: str) -> None:
    ids = exact.tokenizer.encode(text)[:384]
    np.testing.assert_allclose(exact.logits(ids), reference.logits(model, ids), rtol=0, atol=2e-3)


def test_f32_greedy_tokens_equal_transformers(model: PreTrainedModel, exact: ft.LLM) -> None:
    """64 greedy tokens of 20 prompts: each is transformers' own choice wherever that is not a near tie.

    transformers is given our tokens and asked for its choice at each position, which is the same as letting both write
    up to the first difference, and goes on checking after a tie.
    """
    params = ft.SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    prompts = [exact.tokenizer.encode(prompt) for prompt in PROMPTS]
    ties = 0
    for prompt, completion in zip(prompts, exact.generate(prompts, params), strict=True):
        assert len(completion.token_ids) == 64
        rows = reference.log_softmax(reference.logits(model, prompt + completion.token_ids)[len(prompt) - 1 : -1])
        second, first = np.partition(rows, -2, axis=-1)[:, -2:].T
        clear = first - second > 0.01
        assert np.array_equal(rows.argmax(-1)[clear], np.array(completion.token_ids)[clear])
        ties += int((~clear).sum())
    assert ties < 20  # near ties are rare, so the comparison above says something


@pytest.fixture(scope="module")
def rounded(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights rounded to bfloat16, as a checkpoint directory; published values are of this copy."""
    directory = tmp_path_factory.mktemp("bf16")
    model.save_pretrained(directory, state_dict={name: w.bfloat16() for name, w in model.state_dict().items()})
    return directory


def test_published_values(exact: ft.LLM, rounded: Path) -> None:
    """Log-probabilities after two prompts, as measured independently with transformers."""
    tokenizer = exact.tokenizer
    llm = ft.LLM(rounded, weights="f32", context=512)
    (paris,) = tokenizer.encode(" Paris")
    assert tokenizer.encode("The capital of France is") == FRANCE_IDS
    assert reference.log_softmax(llm.logits(FRANCE_IDS)[-1:])[0, paris] == pytest.approx(-0.2606, abs=2e-4)

    assert tokenizer.encode(exact.chat_prompt(FRANCE)) == FRANCE_CHAT_IDS
    last = reference.log_softmax(llm.logits(FRANCE_CHAT_IDS)[-1:])[0]
    top = np.argsort(-last)[:5]
    assert [tokenizer.decode([int(token)]) for token in top] == ["The", "L", "La", "Al", "Le"]
    np.testing.assert_allclose(last[top], [-1.864, -1.963, -2.281, -2.804, -2.901], rtol=0, atol=1e-3)


def test_bf16_copy_continues_as_published(rounded: Path) -> None:
    golden = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34, 216, 33, 34, 42, 33]
    params = ft.SamplingParams(max_tokens=len(golden), temperature=0.0, ignore_eos=True)
    for weights in ("f32", "bf16"):
        (completion,) = ft.LLM(rounded, weights=weights, context=512).generate(FRANCE_IDS, params)
        # At token 12 the two likeliest are within 0.2 nat, which products of bfloat16 may swap.
        certain = len(golden) if weights == "f32" else 12
        assert completion.token_ids[:certain] == golden[:certain]


def test_default_policy_is_accurate(model: PreTrainedModel, packed: ft.LLM, text: str) -> None:
    """What the packed weights and activations cost: the bounds of the default precision policy."""
    ids = packed.tokenizer.encode(text)[:1024]
    agreement = reference.Agreement(reference.logits(model, ids), packed.logits(ids), ids)
    assert agreement.kl <= 1e-3
    assert agreement.top1 >= 0.99
    assert abs(agreement.perplexity_change) <= 2e-3


def test_a8_is_sane(model: PreTrainedModel, smollm2: Path, text: str) -> None:
    """8-bit activations everywhere are allowed to flip close calls, not to break the model."""
    llm = ft.LLM(smollm2, activations="a8", context=2048)
    ids = llm.tokenizer.encode(text)[:512]
    agreement = reference.Agreement(reference.logits(model, ids), llm.logits(ids), ids)
    assert agreement.kl <= 0.02
    assert agreement.top1 >= 0.93
    assert abs(agreement.perplexity_change) <= 0.02


def test_answers_the_question(packed: ft.LLM) -> None:
    (completion,) = packed.chat(FRANCE, ft.SamplingParams(max_tokens=32, temperature=0.0))
    assert "Paris" in completion.text
    assert completion.finish_reason == "stop"
    assert completion.ledger.prompt_tokens == 37
    assert completion.ledger.answer_tokens == len(completion.token_ids)


FIBONACCI = 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n'
FIBONACCI_IDS = """
262 421 308 2651 220 15 510 286 470 220 15 198 262 4409 308 621 220 16 510 286 470 220 16
198 262 770 510 286 264 11 293 284
"""


def large(name: str) -> Path:
    path = MODELS / name
    if not path.exists():
        pytest.skip(f"opt-in: FARTHING_MODELS with {name}")
    return path


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "gemma-3-270m-q4_k_m.gguf",
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    ],
)
def test_larger_models_equal_transformers(name: str, text: str) -> None:
    path = large(name)
    llm = ft.LLM(path, weights="f32", context=512, max_sequences=1)
    ids = llm.tokenizer.encode(text, add_special_tokens="gemma" in name)[:128]
    ours = llm.logits(ids)
    del llm  # two copies of the largest in float32 are 14 GB
    exact = reference.logits(reference.gguf_model(path), ids)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-3 * float(exact.std()))
    assert np.array_equal(ours.argmax(-1), exact.argmax(-1))


@pytest.mark.timeout(600)
def test_qwen_continues_as_published() -> None:
    llm = ft.LLM(large("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"), weights="f32", context=512, max_sequences=1)
    golden = [int(token) for token in FIBONACCI_IDS.split()]
    (completion,) = llm.generate(FIBONACCI, ft.SamplingParams(max_tokens=len(golden), temperature=0.0, ignore_eos=True))
    assert completion.token_ids == golden


@pytest.mark.timeout(600)
def test_gemma_continues_as_published() -> None:
    llm = ft.LLM(large("gemma-3-270m-q4_k_m.gguf"), weights="f32", context=512, max_sequences=1)
    (completion,) = llm.generate(
        "The city of Paris is known for", ft.SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    )
    assert completion.text.startswith(
        " its beautiful architecture, and the Louvre is a must-see attraction for art lovers."
    )
