"""Levers that trade quality for bytes: what they leave out, what they prefer, and that they say so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import farthing as ft
import numpy as np
import pytest
import tiny

Directory = Callable[[str], Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache directory of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def with_top_k(directory: Path, top_k: int, to: Path) -> Path:
    """The same model with another number of experts for each token."""
    shutil.copytree(directory, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": top_k}))
    return to


# Weights that are renormalised, that are not, that are a softmax over the chosen; a shared expert; biases.
FAMILIES = ["mixtral", "qwen3-moe", "qwen2-moe", "olmoe", "granite-moe", "gpt-oss"]


@pytest.mark.parametrize("name", FAMILIES)
def test_to_leave_out_all_but_the_best_is_to_choose_one(name: str, tiny_directory: Directory, tmp_path: Path) -> None:
    directory, ids = tiny_directory(name), tiny.prompt(60)
    one = ft.LLM(with_top_k(directory, 1, tmp_path / "one"), weights="f32")
    model = ft.LLM(directory, weights="f32", expert_skip=1.0)
    assert np.array_equal(model.logits(ids), one.logits(ids))
    ledger = model.ledger
    assert ledger.expert_choices - ledger.expert_skipped == one.ledger.rows * layers(one)
    assert ledger.weight_bytes == one.ledger.weight_bytes


def layers(model: ft.LLM) -> int:
    return sum(matrix.role == "expert_up" for matrix in model.explain())


@pytest.mark.parametrize("name", [*FAMILIES, "deepseek-v3"])
def test_a_threshold_nobody_is_below_changes_no_bit(name: str, tiny_directory: Directory) -> None:
    directory, ids = tiny_directory(name), tiny.prompt(60)
    model = ft.LLM(directory, expert_skip=1e-20)
    assert np.array_equal(model.logits(ids), ft.LLM(directory).logits(ids))
    assert model.ledger.expert_skipped == 0 < model.ledger.expert_choices


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt-oss", "deepseek-v3"])
def test_what_is_left_out_depends_on_the_token_alone(name: str, tiny_directory: Directory) -> None:
    directory, ids = tiny_directory(name), tiny.prompt(60)
    model = ft.LLM(directory, expert_skip=0.7, threads=1)
    expected = model.logits(ids)
    assert 0 < model.ledger.expert_skipped < model.ledger.expert_choices
    assert not np.array_equal(expected, ft.LLM(directory).logits(ids))
    total = sum(row.nbytes for row in model.explain() if row.role.startswith("expert"))
    for options in ({"chunk": 7}, {"threads": 2}, {"expert_memory": total * 2 // 3, "chunk": 5}):
        other = ft.LLM(directory, expert_skip=0.7, **options)  # type: ignore[arg-type]
        assert np.array_equal(other.logits(ids), expected)
        assert other.ledger.expert_skipped == model.ledger.expert_skipped
    params = [ft.SamplingParams(max_tokens=8, ignore_eos=True)] * 3
    prompts = [tiny.prompt(5 + 9 * i) for i in range(3)]
    alone = [model.generate(prompt, params[0])[0].token_ids for prompt in prompts]
    assert [answer.token_ids for answer in model.generate(prompts, params)] == alone


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "granite-moe", "deepseek-v3"])
def test_experts_in_memory_are_preferred(name: str, tiny_directory: Directory) -> None:
    directory, ids = tiny_directory(name), tiny.prompt(200)
    plain = ft.LLM(directory)
    expected = plain.logits(ids)
    budget = sum(row.nbytes for row in plain.explain() if row.role.startswith("expert")) * 3 // 5
    own = ft.LLM(directory, expert_memory=budget, chunk=1)
    assert np.array_equal(own.logits(ids), expected)
    model = ft.LLM(directory, expert_memory=budget, expert_cache_margin=0.6, chunk=1)
    found = model.logits(ids)
    assert np.isfinite(found).all()
    assert not np.array_equal(found, expected)
    before, after = own.ledger, model.ledger
    assert before.expert_substituted == before.expert_choices == 0
    assert 0 < after.expert_substituted < after.expert_choices
    assert after.expert_misses < before.expert_misses
    assert after.expert_bytes < before.expert_bytes


def test_a_margin_changes_nothing_while_every_expert_is_in_memory(tiny_directory: Directory) -> None:
    directory, ids = tiny_directory("mixtral"), tiny.prompt(100)
    model = ft.LLM(directory, expert_memory="1GB", expert_cache_margin=0.9)
    for _ in range(3):
        found = model.logits(ids)
    assert np.array_equal(found, ft.LLM(directory).logits(ids))
    assert model.ledger.expert_substituted == 0


def test_lossy_levers_say_so(tiny_directory: Directory) -> None:
    directory = tiny_directory("mixtral")
    plain = ft.LLM(directory)
    assert plain.explain().lossy == ()
    assert "lossy" not in str(plain.explain())
    model = ft.LLM(directory, expert_memory="1GB", expert_skip=0.9, expert_cache_margin=0.25)
    assert model.explain().lossy == ("expert_skip=0.9", "expert_cache_margin=0.25")
    assert "expert_cache_margin=0.25" in str(model.explain())
    model.logits(tiny.prompt(50))
    assert "experts left out (lossy)" in str(model.ledger)


def test_what_cannot_be_is_an_error(tiny_directory: Directory) -> None:
    directory = tiny_directory("mixtral")
    for wrong in (0, -0.1, 1.01, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"expert_skip: got .*, expected above 0 and at most 1"):
            ft.LLM(directory, expert_skip=wrong)
    for wrong in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"expert_cache_margin: got .*, expected above 0 and below 1"):
            ft.LLM(directory, expert_memory="1GB", expert_cache_margin=wrong)
    for strange in ("much", True, [0.1]):
        with pytest.raises(ValueError, match="expert_skip"):
            ft.LLM(directory, expert_skip=strange)  # type: ignore[arg-type]
    with pytest.raises(ft.UnsupportedError, match="expert_cache_margin without expert_memory"):
        ft.LLM(directory, expert_cache_margin=0.1)
    with pytest.raises(ft.UnsupportedError, match="expert_skip for a model without experts"):
        ft.LLM(tiny_directory("qwen3"), expert_skip=0.1)
