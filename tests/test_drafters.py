"""Drafters that need no model: equal to the originals, as good as the dossier says, harmless with any ids."""

from __future__ import annotations

import doctest
import threading
from collections.abc import Callable
from pathlib import Path

import farthing as ft
import numpy as np
import pytest
from farthing.speculative import (
    Composed,
    Draft,
    Drafter,
    NGram,
    Suffix,
    SuffixDecodingCache,
    SuffixStore,
    TokenRecycling,
    drafters,
    suffix_cache,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from benches.replay import Count, Recording, corpus, replay_all, right

# Few different ids: everything repeats.
TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=60)
MAKERS: dict[str, Callable[[], Drafter]] = {
    "transformers": lambda: NGram("transformers"),
    "vllm": lambda: NGram("vllm", min_n=1, max_n=3),
    "llama.cpp": lambda: NGram("llama.cpp", max_n=2, max_tokens=3),
    "suffix": Suffix,
    "suffix with store": lambda: Suffix(SuffixStore()),
    "suffix trees": lambda: Suffix(SuffixStore(), tree=True),
    "token recycling": TokenRecycling,
    "composed": lambda: Composed(Suffix(SuffixStore(), min_match=2), TokenRecycling()),
    "composed backwards": lambda: Composed(TokenRecycling(), Suffix(tree=True)),
}


@pytest.fixture(scope="module")
def recordings() -> list[Recording]:
    return corpus()


def vllm_rule(text: list[int], min_n: int, max_n: int, most: int) -> list[int]:
    """vLLM's documented semantics, naively: the longest n, the leftmost occurrence that ends before the text does."""
    for n in range(max_n, min_n - 1, -1):
        for start in range(len(text) - n):
            if text[start : start + n] == text[-n:]:
                return text[start + n : start + n + most]
    return []


def transformers_rule(text: list[int], max_n: int, most: int) -> list[int]:
    torch = pytest.importorskip("torch")
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    generator = PromptLookupCandidateGenerator(
        num_output_tokens=most, max_matching_ngram_size=max_n, max_length=len(text) + most + 2
    )
    ids, _ = generator.get_candidates(torch.tensor([text]))
    return ids[0, len(text) :].tolist()


def llama_cpp_rule(text: list[int], n: int, m: int) -> list[int]:
    """llama.cpp's ngram-simple: its history is the text without the last token; that and position 0 do not count."""
    history = text[:-1]
    if len(history) <= n + m + 1:
        return []
    for start in range(len(history) - n - 1, 0, -1):
        if text[start : start + n] == text[-n:]:
            copied = history[start + n : start + n + m]
            return copied if len(copied) >= n else []
    return []


def drafts(drafter: Drafter, text: list[int], begin: int, budget: int = 63) -> list[list[int]]:
    """The draft behind each prefix from ``begin`` on."""
    drafter.begin(text[:begin])
    all_drafts = []
    for end in range(begin, len(text) + 1):
        all_drafts.append(drafter.draft(budget).token_ids)
        drafter.observe(text[end : end + 1])
    return all_drafts


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, max_n=st.integers(1, 4), most=st.integers(1, 8), least=st.integers(1, 4))
def test_ngrams_are_the_originals(text, max_n, most, least):
    begin, least = max(len(text) // 2, 1), min(least, max_n)
    prefixes = [text[:end] for end in range(begin, len(text) + 1)]
    ours = drafts(NGram("vllm", min_n=least, max_n=max_n, max_tokens=most), text, begin)
    assert ours == [vllm_rule(prefix, least, max_n, most) for prefix in prefixes]
    most = max(most, max_n)
    ours = drafts(NGram("llama.cpp", max_n=max_n, max_tokens=most), text, begin)
    assert ours == [llama_cpp_rule(prefix, max_n, most) for prefix in prefixes]


@settings(max_examples=25, deadline=None)
@given(text=TEXTS, max_n=st.integers(1, 3), most=st.integers(1, 8))
def test_prompt_lookup_is_transformers(text, max_n, most):
    ours = drafts(NGram("transformers", max_n=max_n, max_tokens=most), text, 1)
    assert ours == [transformers_rule(text[:end], max_n, most) for end in range(1, len(text) + 1)]


def test_ngrams_are_the_originals_on_real_text(recordings):
    for recording in recordings:
        text, begin = recording.prompt + recording.answer, len(recording.prompt)
        prefixes = [text[:end] for end in range(begin, len(text) + 1)]
        ours = drafts(NGram("vllm", min_n=2, max_n=5, max_tokens=7), text, begin)
        assert ours[::4] == [vllm_rule(prefix, 2, 5, 7) for prefix in prefixes[::4]]
        ours = drafts(NGram("transformers"), text, begin)
        assert ours[::8] == [transformers_rule(prefix, 2, 10) for prefix in prefixes[::8]]
        ours = drafts(NGram("llama.cpp", max_n=3, max_tokens=12), text, begin)
        assert ours == [llama_cpp_rule(prefix, 3, 12) for prefix in prefixes]


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=40, deadline=None)
@given(
    text=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1)), min_size=1, max_size=80),
    budget=st.integers(0, 80),
    top=st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8),
)
def test_any_ids_and_any_budget(name, text, budget, top):
    drafter = MAKERS[name]()
    drafter.begin(text[:1])
    for token in text[1:]:
        drafter.observe([token], rows=[token, text[0]], top=[top, top[::-1]])
        draft = drafter.draft(budget)
        assert len(draft) <= min(budget, 63)
        assert all(-1 <= parent < index for index, parent in enumerate(draft.parents))
        siblings = list(zip(draft.parents, draft.token_ids, strict=True))
        assert len(set(siblings)) == len(siblings)
        assert all(0 < ratio <= 1 for ratio in draft.ratios)
        assert all(0 <= kind <= 9 for kind in draft.classes)
    drafter.end()
    with pytest.raises(ValueError, match="request: got 0, expected one that has begun"):
        drafter.observe([1])


@settings(max_examples=150, deadline=None)
@given(text=st.lists(st.integers(0, 3), min_size=2, max_size=50))
def test_a_suffix_draft_is_what_followed(text):
    """The first token follows the longest match or a shorter one, and is the most frequent there."""
    drafter = Suffix()
    drafter.begin(text)
    draft = drafter.draft(8)
    longest = max((n for n in range(len(text)) if _ends(text, n)), default=0)
    if longest == 0:
        assert draft.token_ids == []
        return
    if not draft.token_ids:
        # All continuations are rarer than one in ten.
        return
    matched = draft.classes[0] - 1
    assert 1 <= matched <= min(longest, 8)
    if matched < 8:
        followers = [text[end] for end in _ends(text, matched)]
        assert followers.count(draft.token_ids[0]) == max(map(followers.count, followers))
        assert draft.ratios[0] == pytest.approx(followers.count(draft.token_ids[0]) / len(followers))


def _ends(text: list[int], n: int) -> list[int]:
    """Where the last n tokens ended before."""
    return [end for end in range(n, len(text)) if text[end - n : end] == text[len(text) - n :]] if n else []


def test_trees_hold_what_chains_miss():
    drafter = Suffix(tree=True)
    drafter.begin([1, 2, 1, 3, 1, 2, 1, 3, 1])
    draft = drafter.draft(6)
    assert right(draft, [2, 1]) == 2
    assert right(draft, [3, 1]) == 2


def test_prompts_are_looked_up_and_requests_do_not_meet_without_a_store():
    drafter = Suffix()
    drafter.begin([1, 2, 3, 4, 5], request=1)
    drafter.begin([9, 1, 2], request=2)
    assert drafter.draft(5, request=2).token_ids == []
    drafter.observe([2, 3], request=1)
    assert drafter.draft(2, request=1).token_ids == [4, 5]


def test_a_long_request_forgets_its_beginning_and_goes_on():
    drafter = Suffix()
    drafter.begin([7, 8, 9, 10])
    for start in range(0, 90_000, 1000):
        drafter.observe(np.arange(start + 100, start + 1100))
    drafter.observe([80_000, 80_001])
    assert drafter.draft(3).token_ids == [80_002, 80_003, 80_004]
    drafter.observe([7, 8])
    assert drafter.draft(3).token_ids == []


def test_a_store_survives_and_damage_is_an_error(tmp_path: Path):
    store = SuffixStore("1MB")
    first = Suffix(store)
    first.begin(list(range(100, 140)))
    first.observe([1, 2, 3, 4, 5])
    path = tmp_path / "answers"
    store.save(path)
    assert list(tmp_path.iterdir()) == [path]
    again = SuffixStore()
    again.load(path)
    assert (again.tokens, again.texts) == (store.tokens, 1)
    # The same question finds the answer before its first token.
    second = Suffix(again)
    second.begin(list(range(100, 140)))
    assert second.draft(5).token_ids == [1, 2, 3, 4, 5]
    data = path.read_bytes()
    for damaged in (b"", data[:20], data[:-1], b"GGUF" + data[4:], data[:30] + b"\xff" + data[31:]):
        path.write_bytes(damaged)
        with pytest.raises(ft.FormatError, match="answers: expected"):
            again.load(path)
    assert again.texts == 2
    with pytest.raises(ft.FormatError):
        again.load(tmp_path / "none")
    with pytest.raises(ft.FarthingError):
        again.save(tmp_path / "none" / "answers")
    with pytest.raises(ValueError, match="max_bytes"):
        SuffixStore(1000)


def test_a_store_takes_at_most_110_bytes_a_token(recordings):
    store = SuffixStore("64MB")
    for recording in recordings:
        store.add(recording.prompt + recording.answer)
    assert store.tokens == sum(len(r.prompt) + len(r.answer) for r in recordings)
    assert store.nbytes <= 110 * store.tokens
    small = SuffixStore("256KiB")
    for recording in recordings:
        small.add(recording.prompt + recording.answer)
        assert small.nbytes <= 1.05 * (256 << 10)


def test_threads_share_a_store(recordings):
    store = SuffixStore()
    failed = []

    def work(part: int) -> None:
        try:
            replay_all(Suffix(store, tree=part % 2 == 0), recordings[part::4], 15)
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert store.texts == len(recordings)


def of_cache(recordings: list[Recording], most: int) -> Count:
    """Chains of a suffix cache with the defaults of arctic-inference, each request alone."""
    total = Count()
    for recording in recordings:
        cache, text, answer, at = SuffixDecodingCache(), list(recording.prompt), recording.answer, 1
        cache.start_request(0, text)
        cache.add_active_response(0, answer[:1])
        text += answer[:1]
        while at < len(answer):
            draft = cache.speculate(0, text[-64:], max_spec_tokens=most)
            accepted = right(Draft(draft.token_ids, draft.parents, [], []), answer[at:])
            after = min(at + accepted + 1, len(answer))
            cache.add_active_response(0, answer[at:after])
            text += answer[at:after]
            total += Count(1, after - at, len(draft.token_ids), accepted)
            at = after
    return total


def test_tokens_per_pass(recordings):
    """Beside the figures of another 35 prompts of the same kinds, which farthing's own plan was made with."""
    expected = {
        "transformers, n <= 2, 10": (1.75, NGram("transformers"), 10),
        "vllm, 2 to 5, 3": (1.48, NGram("vllm", min_n=2, max_n=5, max_tokens=3), 3),
        "vllm, 2 to 5, 7": (1.59, NGram("vllm", min_n=2, max_n=5, max_tokens=7), 7),
        "suffix of 3 else recycling, 7": (1.84, Composed(Suffix(min_match=3), TokenRecycling()), 7),
    }
    got = {name: replay_all(drafter, recordings, most)["all"].per_pass for name, (_, drafter, most) in expected.items()}
    got["suffix cache, 15"] = of_cache(recordings, 15).per_pass
    wanted = {name: figure for name, (figure, _, _) in expected.items()} | {"suffix cache, 15": 1.67}
    # Never worse than those by more than 0.05; where the prompts give more, so be it.
    assert all(got[name] >= wanted[name] - 0.05 for name in wanted), got
    recorded = (1.800, 1.520, 1.641, 1.956, 1.695)
    assert tuple(got.values()) == pytest.approx(recorded, abs=0.003)


def test_what_was_said_before_is_drafted_whole(recordings):
    store = SuffixStore()
    replay_all(Suffix(store), recordings, 15)
    again = replay_all(Suffix(store), recordings, 15)["all"]
    assert again.per_pass > 9.98
    assert again.rate > 0.8


def test_suffix_decoding_cache():
    cache = SuffixDecodingCache(max_tree_depth=16, max_cached_requests=2)
    assert (cache.max_tree_depth, cache.max_cached_requests) == (16, 2)
    cache.start_request("a", np.array([1, 2, 3, 4], np.int32))
    with pytest.raises(ValueError, match="already active"):
        cache.start_request("a", [1])
    cache.add_active_response("a", [5, 6, 7, 8])
    assert list(cache.active_requests) == ["a"]
    cache.stop_request("a")
    for call in (lambda: cache.stop_request("a"), lambda: cache.add_active_response("a", [1])):
        with pytest.raises(ValueError, match="not active"):
            call()
    # Answers are found by others, prompts are not.
    cache.start_request(("b", 1), [9])
    draft = cache.speculate(("b", 1), np.array([5, 6], np.int32), max_spec_tokens=8)
    assert (draft.token_ids, draft.parents, draft.probs, draft.score, draft.match_len) == (
        [7, 8],
        [-1, 0],
        [1, 1],
        2,
        2,
    )
    assert cache.speculate(("b", 1), [2, 3]).token_ids == []
    assert cache.speculate(("b", 1), [5, 6], max_spec_tokens=8, max_spec_factor=0.5).token_ids == [7]
    assert cache.speculate(("b", 1), [6], max_spec_offset=1.0, use_tree_spec=True).token_ids == [7, 8]
    cache.start_request("c", [9])
    assert list(cache.cached_requests) == [("b", 1), "c"]
    cache.add_active_response("c", [30, 31])
    cache.evict_cached_response("c")
    assert cache.speculate(("b", 1), [30]).token_ids == []
    with pytest.raises(ValueError, match="not cached"):
        cache.evict_cached_response("c")
    none = SuffixDecodingCache(max_cached_requests=0)
    none.start_request(0, [1, 2, 1])
    assert list(none.cached_requests) == []
    assert none.speculate(0, [1]).token_ids == [2]


def test_bad_arguments_are_named():
    for make, name in (
        (lambda: NGram("best"), "mode"),
        (lambda: NGram("transformers", min_n=2), "min_n"),
        (lambda: NGram("vllm", min_n=4, max_n=3), "min_n"),
        (lambda: NGram("llama.cpp", max_tokens=5), "max_tokens"),
        (lambda: NGram(max_n=0), "max_n"),
        (lambda: Suffix(min_match=0), "min_match"),
        (lambda: Suffix(min_probability=2.0), "min_probability"),
        (Composed, "drafters"),
    ):
        with pytest.raises(ValueError, match=name):
            make()
    drafter = TokenRecycling()
    for prompt in ([-1], [2**32], np.array([-1], np.int32)):
        with pytest.raises(ValueError, match="prompt: got"):
            drafter.begin(prompt)
    drafter.begin([1])
    with pytest.raises(ValueError, match="top: got 2 rows, expected 1"):
        drafter.observe([1], rows=[1], top=[[1], [2]])
    with pytest.raises(ValueError, match="rows of at most 8"):
        drafter.observe([1], rows=[1], top=[list(range(9))])


def test_examples():
    for module in (drafters, suffix_cache):
        assert doctest.testmod(module).failed == 0
