"""The Python face on the default model: prompts, streams, ledgers, errors, interrupts."""

import gc
import os
import pickle
import signal
import threading
import time

import farthing as ft
import numpy as np
import pytest

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SHORT = ft.SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def llm(smollm2):
    return ft.LLM(smollm2, context=2048)


def test_the_capital_of_france(llm):
    (answer,) = llm.chat(QUESTION)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    assert answer.ledger.answer_tokens == len(answer.token_ids)


def test_every_form_of_a_prompt(llm):
    text = "The capital of France is"
    ids = llm.tokenizer.encode(text, add_special_tokens=True)
    forms = [text, ids, tuple(ids), np.array(ids), np.array(ids, np.uint16)]
    answers = [llm.generate(form, SHORT)[0] for form in forms]
    assert len({answer.text for answer in answers}) == 1
    together = llm.generate(forms, SHORT)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in answers]
    assert llm.generate([]) == []


def test_one_set_of_parameters_for_each_prompt(llm):
    params = [ft.SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 2, 5)]
    answers = llm.generate(["a", "b", "c"], params)
    assert [len(answer.token_ids) for answer in answers] == [1, 2, 5]
    assert {answer.finish_reason for answer in answers} == {"length"}
    with pytest.raises(ValueError, match="params: got 2, expected one, or one for each of the 3 prompts"):
        llm.generate(["a", "b", "c"], params[:2])


@pytest.mark.parametrize(
    "prompt",
    [[1.5], [[1.5]], [-1], [2**40], [True], np.zeros((2, 2)), np.array([0.5]), [None], 7, {"a": 1}, [["a"]]],
    ids=repr,
)
def test_what_is_no_prompt(llm, prompt):
    with pytest.raises((ValueError, TypeError)):
        llm.generate(prompt)


def test_errors_name_their_argument(llm):
    with pytest.raises(ValueError, match="token id: got 49152, expected below 49152"):
        llm.generate([49152])
    with pytest.raises(ValueError, match=r"prompt: got .* tokens, expected at most"):
        llm.generate([1] * 3000)
    with pytest.raises(ValueError, match="prompt: got no tokens"):
        llm.generate([[]])
    with pytest.raises(ValueError, match="params: got dict"):
        llm.generate("a", {"max_tokens": 3})
    with pytest.raises(ValueError, match="messages"):
        llm.chat("hello")
    with pytest.raises(ValueError, match="messages"):
        llm.chat([{"role": "user", "content": object()}])
    with pytest.raises(ValueError, match="template variables"):
        llm.stream("hello", enable_thinking=True)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"weights": "int3"}, ValueError, "weights: got"),
        ({"weights": 4}, ValueError, "weights: got 4"),
        ({"weights": "ternary"}, ft.UnsupportedError, 'use "auto"'),
        ({"activations": "a4"}, ValueError, "activations: got"),
        ({"kv": "int8"}, ValueError, "kv: got"),
        ({"threads": 0}, ValueError, "threads: got 0"),
        ({"threads": 10**6}, ValueError, "threads: got 1000000"),
        ({"max_sequences": 0}, ValueError, "max_sequences: got 0"),
        ({"max_sequences": None}, ValueError, "max_sequences: got None"),
        ({"context": -5}, ValueError, "context: got -5"),
        ({"context": 10**6}, ValueError, "context: got 1000000"),
        ({"chunk": 0}, ValueError, "chunk: got 0"),
        ({"kv_pages": 0.5}, ValueError, "kv_pages: got 0.5"),
        ({"speculation": "ngram"}, ft.UnsupportedError, 'use "auto", None, a drafter'),
    ],
    ids=repr,
)
def test_load_options_are_checked(smollm2, option, error, message):
    with pytest.raises(error, match=message):
        ft.LLM(smollm2, **option)


def test_a_stream_says_what_generate_says(llm):
    prompt = "Once upon a time"
    params = ft.SamplingParams(max_tokens=40, temperature=0.9, seed=7)
    stream = llm.stream(prompt, params)
    pieces = list(stream)
    (answer,) = llm.generate(prompt, params)
    assert len(pieces) > 5
    assert "".join(pieces) == answer.text == stream.completion.text
    assert stream.completion.token_ids == answer.token_ids
    assert list(stream) == []


def test_a_conversation_streams(llm):
    assert "Paris" in "".join(llm.stream(QUESTION))


def test_closing_a_stream_cancels(llm):
    with llm.stream("Count to a thousand:", ft.SamplingParams(max_tokens=1500, ignore_eos=True)) as stream:
        next(stream)
    assert stream.completion.finish_reason == "cancelled"
    assert 1 <= len(stream.completion.token_ids) < 1500


def test_a_forgotten_stream_cancels(llm):
    before = llm.ledger.requests
    stream = llm.stream("Count to a thousand:", ft.SamplingParams(max_tokens=1500, ignore_eos=True))
    next(stream)
    del stream
    gc.collect()
    deadline = time.monotonic() + 20
    while llm.ledger.requests == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    rows = llm.ledger.rows
    time.sleep(0.2)
    assert llm.ledger.rows == rows


@pytest.fixture
def interruptible():
    """Python's own handler, even where the shell started us with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_reaches_a_waiting_caller(llm):
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Count:"] * 4, ft.SamplingParams(max_tokens=1900, ignore_eos=True))
    assert time.monotonic() - start < 10
    timer.join()
    assert "Paris" in llm.chat(QUESTION)[0].text


def test_other_threads_run_while_one_waits(llm):
    ticks, done = 0, threading.Event()

    def tick():
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    llm.generate("a", ft.SamplingParams(max_tokens=64, ignore_eos=True))
    done.set()
    thread.join()
    assert ticks > 10


def test_eight_threads_share_one_model(llm):
    params = ft.SamplingParams(max_tokens=16, temperature=0.7, seed=3)
    prompts = [f"{n} is a number that" for n in range(8)]
    expected = [llm.generate(prompt, params)[0].token_ids for prompt in prompts]
    results = {}

    def work(index):
        results[index] = [llm.generate(prompts[index], params)[0].token_ids for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {index: [expected[index]] * 3 for index in range(8)}


def test_the_ledger_adds_up(llm):
    (answer,) = llm.generate("The capital of France is", ft.SamplingParams(max_tokens=10, ignore_eos=True))
    ledger = answer.ledger
    assert ledger.prompt_tokens == len(llm.tokenizer.encode("The capital of France is", add_special_tokens=True))
    assert (ledger.answer_tokens, ledger.thinking_tokens, ledger.passes + ledger.accepted) == (10, 0, 10)
    assert ledger.weight_bytes > 0.9 * ledger.passes * 50e6
    assert ledger.kv_bytes > 0
    assert ledger.decode_rate > 0
    assert ledger.cost({}) == 0
    prices = {"input_per_million": 1e6, "output_per_million": 2e6, "cpu_hour": 3600.0}
    assert ledger.cost(prices) == pytest.approx(ledger.prompt_tokens + 20 + ledger.cpu_seconds)
    assert "10 tokens" in str(ledger)
    assert "<td" in ledger._repr_html_()
    assert pickle.loads(pickle.dumps(answer)) == answer
    total = llm.ledger
    assert total.passes + total.accepted >= 10
    assert total.decode_bandwidth > 0


@pytest.mark.parametrize("prices", [{"gpu_hour": 1.0}, {"cpu_hour": -1}, {"cpu_hour": float("nan")}, {"cpu_hour": "1"}])
def test_bad_prices(llm, prices):
    ledger = llm.generate("a", ft.SamplingParams(max_tokens=1))[0].ledger
    with pytest.raises(ValueError, match="prices"):
        ledger.cost(prices)


def test_logprobs(llm):
    (answer,) = llm.generate("The capital of France is", ft.SamplingParams(max_tokens=4, logprobs=3, ignore_eos=True))
    assert [entry.token for entry in answer.logprobs] == answer.token_ids
    for entry in answer.logprobs:
        assert len(entry.top) == 3
        assert entry.top[0] == (entry.token, pytest.approx(entry.logprob))
    assert llm.generate("a", SHORT)[0].logprobs is None


def test_logits_have_a_row_for_each_token(llm):
    ids = llm.tokenizer.encode("The capital of France is")
    logits = llm.logits(ids)
    assert logits.shape == (len(ids), llm.vocabulary)
    assert logits.dtype == np.float32
    assert llm.tokenizer.decode([int(logits[-1].argmax())]) == " Paris"


def test_the_tokenizer_goes_both_ways(llm):
    text = "Grüße, 世界! 🎉 1234\n\ttabs"
    ids = llm.tokenizer.encode(text)
    assert llm.tokenizer.decode(ids) == text
    assert llm.tokenizer.encode("<|im_start|>") == [1]
    assert llm.tokenizer.decode([1, *ids], skip_special_tokens=True) == text


def test_chat_prompts_are_the_templates(llm):
    prompt = llm.chat_prompt([{"role": "system", "content": "Be brief."}, *QUESTION])
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_explain_names_every_matrix(llm):
    matrices = llm.explain()
    assert len(matrices) == 1 + 7 * 30
    assert {matrix.role for matrix in matrices} >= {"head", "query", "down"}
    assert matrices.nbytes == sum(matrix.nbytes for matrix in matrices) > 70e6
    table = str(matrices)
    assert "0–29" in table
    assert len(table.splitlines()) < 20
    assert "<table>" in matrices._repr_html_()


def test_loading_reports_its_progress(smollm2):
    seen = []
    ft.LLM(smollm2, max_sequences=1, context=128, progress=lambda *event: seen.append(event))
    assert {stage for stage, _, _ in seen} == {"load"}
    assert seen == sorted(seen)
    assert seen[-1][1] <= seen[-1][2]


def test_an_error_in_the_progress_callback_is_raised(smollm2):
    def progress(*_):
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        ft.LLM(smollm2, progress=progress)


def test_a_long_prompt_reports_its_progress(smollm2):
    llm = ft.LLM(smollm2, chunk=16, context=256, max_sequences=1)
    seen = []
    stream = llm.stream([5] * 100, ft.SamplingParams(max_tokens=1), progress=lambda *event: seen.append(event))
    list(stream)
    assert seen[0][0] == "prompt"
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})
    assert {total for _, _, total in seen} == {100}


def test_damaged_files_are_format_errors(tmp_path):
    for name, content in {"empty": b"", "short": b"GGUF", "text": b"hello, this is no model"}.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(ft.FormatError):
            ft.LLM(path)
    with pytest.raises(ft.FormatError):
        ft.LLM(tmp_path / "..")


def test_plan_predicts_what_loading_does(smollm2, llm):
    from farthing.plan import plan

    found = plan(smollm2)
    assert found.matrices == llm.explain()
    assert found.resident_bytes == llm.explain().nbytes
    assert found.kv_bytes_per_token == 2 * 30 * 3 * 64 * 2
    assert found.decode_rate == pytest.approx(found.limits.bandwidth / found.bytes_per_token)
    assert found.prompt_rate > found.decode_rate
    assert "tok/s" in str(found)
    assert plan(smollm2, weights="f32").resident_bytes > 4 * found.resident_bytes
