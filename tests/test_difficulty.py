"""Computation by difficulty: samples that agree, truncation levels, and weights between two checkpoints."""

from __future__ import annotations

import doctest
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import farthing as ft
import numpy as np
import pytest
from farthing.reasoning.consistency import answer_key, decided, majority_confidence

ASK = [{"role": "user", "content": "What is 3 + 4? Put the final answer in \\boxed{}."}]
DRAW = ft.SamplingParams(temperature=0.8, seed=5, max_tokens=48)


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> ft.LLM:
    return ft.LLM(smollm2, context=512, speculation=None)


# --- agreement -------------------------------------------------------------------------------------------------------


@dataclass
class Said:
    """A stream that has ended; closing it cuts its tokens."""

    text: str
    cancelled: bool = False

    def close(self) -> None:
        self.cancelled = True

    @property
    def completion(self) -> ft.Completion:
        tokens = 3 if self.cancelled else 10
        ledger = ft.Ledger(9, 0, 0, tokens, 0, 0, 1, 0, 0, 0, 0.0, 0, 0.0, 0.0, 0.0, 0.0)
        return ft.Completion(self.text, [], "cancelled" if self.cancelled else "stop", ledger)


class Script:
    """A model whose k-th sample votes for the k-th letter; ``-`` gives no answer."""

    def __init__(self, letters: str) -> None:
        self.letters, self.asked = letters, list[ft.SamplingParams]()

    def stream(self, prompt: Any, params: ft.SamplingParams) -> Said:
        assert prompt == "p"
        self.asked.append(params)
        letter = self.letters[len(self.asked) - 1]
        return Said("no idea" if letter == "-" else f"Answer: {letter}")


def winner(letters: str) -> str | None:
    """By definition: the most votes, the earliest of equals."""
    votes = Counter(letter for letter in letters if letter != "-")
    return max(votes, key=lambda letter: (votes[letter], -letters.index(letter))) if votes else None


@pytest.mark.parametrize("together", [1, 3])
def test_stopping_when_decided_never_changes_the_answer(together: int) -> None:
    saved = 0
    for letters in map("".join, product("ab-", repeat=6)):
        script: Any = Script(letters)
        found = ft.reasoning.self_consistency(script, "p", 6, DRAW, together=together)
        assert found.answer == winner(letters), letters
        assert found.stopped == ("all" if found.judged == 6 else "decided")
        assert found.votes == {key: count for key, count in Counter(letters[: found.judged]).items() if key != "-"}
        assert found.tokens == 10 * found.judged + 3 * (len(found.completions) - found.judged)
        assert len(found.completions) == len(script.asked) <= found.judged + together - 1
        saved += 6 - found.judged
    assert saved > 0


def test_decided_is_exact() -> None:
    # Every continuation of the votes, played out.
    for letters in map("".join, product("abc", repeat=4)):
        votes = dict(Counter(letters))
        for left in range(4):
            ends = {winner(letters + "".join(more)) for more in product("abcd-", repeat=left)}
            assert decided(votes, left) == (len(ends) == 1), (letters, left)
    assert decided({}, 0)
    assert not decided({}, 1)


def test_the_posterior_is_the_beta_mass() -> None:
    grid = np.linspace(0, 1, 200_001)
    for first, second in [(0, 0), (1, 0), (3, 1), (4, 0), (7, 5)]:
        density = grid**first * (1 - grid) ** second
        expected = density[grid > 0.5].sum() / density.sum()
        assert majority_confidence({"a": second, "b": first, "c": 0}) == pytest.approx(expected, abs=1e-4)


def test_the_posterior_rule_stops_earlier_and_says_so() -> None:
    script: Any = Script("aaaabbbbbb")
    found = ft.reasoning.self_consistency(script, "p", 10, DRAW, agree=0.95, together=2)
    assert (found.answer, found.judged, found.stopped) == ("a", 4, "posterior")
    assert len(found.completions) == 5
    assert found.best is found.completions[0]
    assert ft.reasoning.self_consistency(Script("aaaabbbbbb"), "p", 10, DRAW).answer == "b"  # type: ignore[arg-type]


def test_what_answers_vote_for() -> None:
    same = ["Answer: 1,200", "so \\boxed{1200.0}", "Answer: $1200", "**Answer:** \\boxed{ 1200 }"]
    assert len({answer_key(text) for text in same}) == 1
    assert answer_key("\\boxed{\\dfrac{a}{ b }}") == answer_key("\\boxed{\\frac{a}{b}}") == "\\frac{a}{b}"
    assert answer_key("It is 1200.") is None


def test_seeds_go_up_and_wrap() -> None:
    script: Any = Script("abab")
    ft.reasoning.self_consistency(script, "p", 4, replace(DRAW, seed=2**64 - 2), together=4)
    assert [params.seed for params in script.asked] == [2**64 - 2, 2**64 - 1, 0, 1]


def test_bad_arguments_of_self_consistency() -> None:
    script: Any = Script("a")
    for arguments, message in [
        ({"samples": 0}, "samples: got 0"),
        ({"together": 0}, "together: got 0"),
        ({"agree": 0.5}, "agree: got 0.5"),
        ({"agree": 1.0}, "agree: got 1.0"),
        ({"agree": math.nan}, "agree: got nan"),
        ({"params": ft.SamplingParams()}, "temperature 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ft.reasoning.self_consistency(script, "p", **arguments)
    assert script.asked == []


def test_real_samples_agree_and_the_rest_is_cancelled(llm: ft.LLM) -> None:
    # Everyone votes for the same, so three of five decide, and the fourth and fifth are cut short.
    runs = [
        ft.reasoning.self_consistency(llm, ASK, 5, replace(DRAW, max_tokens=size), together=5, key=lambda _: "same")
        for size in (24, 24)
    ]
    for found in runs:
        assert (found.answer, found.judged, found.stopped) == ("same", 3, "decided")
        assert len(found.completions) == 5
        assert {each.finish_reason for each in found.completions[:3]} <= {"stop", "length"}
        assert found.tokens == sum(len(each.token_ids) for each in found.completions)
    assert [each.text for each in runs[0].completions[:3]] == [each.text for each in runs[1].completions[:3]]
    alone = ft.reasoning.self_consistency(llm, ASK, 5, replace(DRAW, max_tokens=24), together=1, key=lambda _: "same")
    assert [each.text for each in alone.completions] == [each.text for each in runs[0].completions[:3]]


def test_a_running_sample_is_cancelled_and_its_tokens_count(llm: ft.LLM) -> None:
    # With these seeds the first sample takes 8 tokens and the second 49.
    params = replace(DRAW, seed=8, max_tokens=200)
    found = ft.reasoning.self_consistency(llm, ASK, 5, params, together=2, agree=0.6, key=lambda _: "same")
    assert (found.judged, found.stopped) == (1, "posterior")
    first, second = found.completions
    assert (first.finish_reason, second.finish_reason) == ("stop", "cancelled")
    assert found.tokens == len(first.token_ids) + len(second.token_ids)
    assert len(second.token_ids) < 40


# --- truncation levels -----------------------------------------------------------------------------------------------


def test_levels_settle_count_probes_and_do_not_change_the_text(llm: ft.LLM) -> None:
    asks = [ASK, [{"role": "user", "content": "Count from one to fifty in words."}]]
    levels = (8, 16, 24, 40)
    found = ft.reasoning.truncation_levels(llm, asks, levels, agree=2)
    whole = llm.chat(asks, ft.SamplingParams(max_tokens=levels[-1]))
    assert found == ft.reasoning.truncation_levels(llm, asks, levels, agree=2)
    assert found[0] == ft.reasoning.truncation_levels(llm, asks[:1], levels, agree=2)[0]
    for settled, completion in zip(found, whole, strict=True):
        count = settled.thinking_tokens
        # What was thought is what the model writes without levels, up to the cut.
        assert settled.text.startswith(llm.tokenizer.decode(completion.token_ids[:count]))
        if settled.level < len(levels):
            assert count == levels[settled.level]
            assert settled.probe_tokens > 0
        else:
            assert (count, settled.truncated) == (len(completion.token_ids), False)
        assert settled.tokens == count + settled.probe_tokens
    one = ft.reasoning.truncation_levels(llm, [ASK], (8, 16), agree=1)[0]
    assert one.level == 0 or one.answer is None or one.level == 2


def test_bad_arguments_of_truncation_levels(llm: ft.LLM) -> None:
    for arguments, message in [
        ({"levels": ()}, "levels: got"),
        ({"levels": (8, 8)}, "levels: got"),
        ({"levels": (16, 8)}, "levels: got"),
        ({"levels": (0, 8)}, "levels: got 0"),
        ({"levels": (8, 16), "agree": 3}, "agree: got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            ft.reasoning.truncation_levels(llm, [ASK], **arguments)


# --- weights between two checkpoints ---------------------------------------------------------------------------------

Tensors = dict[str, Any]


def save(path: Path, tensors: Tensors, shards: int = 1, **config: Any) -> Path:
    torch_file = pytest.importorskip("safetensors.torch")
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 2} | config))
    (path / "tokenizer.json").write_text(f'"{path.name}"')
    names = list(tensors)
    files = ["model.safetensors"] if shards == 1 else [f"model-{k}-of-{shards}.safetensors" for k in range(shards)]
    for k, file in enumerate(files):
        torch_file.save_file({name: tensors[name] for name in names[k::shards]}, path / file, metadata={"format": "pt"})
    if shards > 1:
        weight_map = {name: files[k % shards] for k, name in enumerate(names)}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def weights(seed: int, dtype: str = "float32", head: bool = True) -> Tensors:
    torch = pytest.importorskip("torch")
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (7, 4),
        "model.norm.weight": (4,),
        "model.layers.0.mlp.up_proj.weight": (6, 4),
    }
    shapes |= {"lm_head.weight": (7, 4)} if head else {}
    return {name: torch.randn(shape, generator=draw).to(getattr(torch, dtype)) for name, shape in shapes.items()}


def load(path: Path) -> Tensors:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("other", ["float32", "bfloat16"])
def test_weights_in_between_are_what_torch_says(dtype: str, other: str, tmp_path: Path) -> None:
    long, short = weights(0, dtype), weights(1, other)
    a, b = save(tmp_path / "a", long, shards=2), save(tmp_path / "b", short)
    for lam in (0.0, 0.3, 1.0):
        out = ft.reasoning.interpolate(a, b, lam, tmp_path / f"{lam}")
        found = load(out)
        assert found.keys() == long.keys()
        for name, tensor in found.items():
            expected = (long[name].float() * np.float32(1 - lam) + short[name].float() * np.float32(lam)).to(
                tensor.dtype
            )
            assert tensor.dtype == long[name].dtype
            assert tensor.equal(expected), (name, lam)
        assert (out / "tokenizer.json").read_text() == '"a"'
        assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in a.iterdir())
    assert not list(tmp_path.glob("*.partial"))


def test_bfloat16_rounds_to_nearest_and_keeps_odd_values(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    odd = torch.tensor([math.inf, -math.inf, math.nan, 3.0e38, 1e-40, -0.0, 1.00390625, 1.01171875])
    a = save(tmp_path / "a", {"x": odd.to(torch.bfloat16)})
    b = save(tmp_path / "b", {"x": odd})
    found = load(ft.reasoning.interpolate(a, b, 0.5, tmp_path / "out"))["x"]
    expected = (odd.to(torch.bfloat16).float() * 0.5 + odd * 0.5).to(torch.bfloat16)
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_a_tied_head_stands_for_its_embedding(tmp_path: Path) -> None:
    tied, apart = weights(0, head=False), weights(1)
    a, b = save(tmp_path / "a", apart), save(tmp_path / "b", tied)
    found = load(ft.reasoning.interpolate(a, b, 1.0, tmp_path / "out"))
    assert found["lm_head.weight"].equal(tied["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match=r"lm_head.weight: .* has one of its own"):
        ft.reasoning.interpolate(b, a, 0.5, tmp_path / "no")
    same = weights(1) | {"lm_head.weight": weights(1)["model.embed_tokens.weight"].clone()}
    ft.reasoning.interpolate(b, save(tmp_path / "c", same), 0.5, tmp_path / "yes")


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base = weights(0)
    a = save(tmp_path / "a", base | {"mask": torch.ones(3, dtype=torch.int64)})
    name = "model.norm.weight"
    cases: dict[str, tuple[Tensors, dict[str, Any], type[Exception], str]] = {
        "shape": ({name: torch.ones(5)}, {}, ValueError, rf"{name}: F32 \[5\] .*expected F32 \[4\]"),
        "kind": ({name: torch.ones(4, dtype=torch.int8)}, {}, ft.UnsupportedError, f"{name}: "),
        "mask": ({"mask": torch.zeros(3, dtype=torch.int64)}, {}, ft.UnsupportedError, "mask: "),
        "extra": ({"new": torch.ones(1)}, {}, ValueError, "new: in .*b-extra, but not in"),
        "heads": ({}, {"num_attention_heads": 4}, ValueError, "num_attention_heads is 4, expected 2"),
    }
    mask = {"mask": torch.ones(3, dtype=torch.int64)}
    for case, (change, config, kind, message) in cases.items():
        b = save(tmp_path / f"b-{case}", base | mask | change, **config)
        with pytest.raises(kind, match=message):
            ft.reasoning.interpolate(a, b, 0.5, tmp_path / "out")
    with pytest.raises(ValueError, match=r"model.norm.weight: in .*/a, but not in"):
        ft.reasoning.interpolate(
            a, save(tmp_path / "less", {k: v for k, v in (base | mask).items() if k != name}), 0.5, tmp_path / "out"
        )
    for lam in (-0.1, 1.1, math.nan, "x"):
        with pytest.raises(ValueError, match="lam: got"):
            ft.reasoning.interpolate(a, a, lam, tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError):
        ft.reasoning.interpolate(a, a, 0.5, tmp_path)


def header(entries: Any, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        b"\xff" * 64,
        header(b"{"),
        header(b"[" * 100_000),
        header([]),
        header({"x": 3}),
        header({"x": {}}),
        header({"x": F32}),
        header({"x": F32}, b"12345"),
        header({"x": F32 | {"shape": [2]}}, b"1234"),
        header({"x": F32 | {"shape": [-1]}}, b"1234"),
        header({"x": F32 | {"shape": "1"}}, b"1234"),
        header({"x": F32 | {"shape": [2**62, 2**62]}}, b"1234"),
        header({"x": F32 | {"data_offsets": [4, 0]}}, b"1234"),
        header({"x": F32 | {"data_offsets": [0]}}, b"1234"),
        header({"x": F32 | {"data_offsets": [4, 8]}}, b"12345678"),
        header({"x": F32, "y": F32}, b"1234"),
    ],
)
def test_damaged_files_are_format_errors(content: bytes, tmp_path: Path) -> None:
    good = save(tmp_path / "good", {"x": pytest.importorskip("torch").ones(1)})
    bad = save(tmp_path / "bad", {"x": pytest.importorskip("torch").ones(1)})
    (bad / "model.safetensors").write_bytes(content)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ft.FormatError):
            ft.reasoning.interpolate(*pair, 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_indices_are_format_errors(tmp_path: Path) -> None:
    a = save(tmp_path / "a", weights(0), shards=2)
    index = a / "model.safetensors.index.json"
    whole = json.loads(index.read_text())["weight_map"]
    for content in ("{", "[]", "{}", '{"weight_map": {"x": 1}}', '{"weight_map": {"x": "../a.safetensors"}}',
                    json.dumps({"weight_map": whole | {"absent": "model-0-of-2.safetensors"}})):  # fmt: skip
        index.write_text(content)
        with pytest.raises(ft.FormatError):
            ft.reasoning.interpolate(a, a, 0.5, tmp_path / "out")


def test_the_engine_runs_what_lies_between(tiny_directory: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_directory("llama-2")
    # Halfway between a model and itself lies the model.
    out = ft.reasoning.interpolate(path, path, 0.5, tmp_path / "out")
    ids = [1, 2, 3, 4]
    expected = ft.LLM(path, weights="f32", speculation=None).logits(ids)
    np.testing.assert_allclose(ft.LLM(out, weights="f32", speculation=None).logits(ids), expected, atol=1e-5)
    assert (out / "model.safetensors").stat().st_size == (path / "model.safetensors").stat().st_size


def test_examples_in_docstrings_run() -> None:
    for name in ("consistency", "tasks", "report", *(["grading"] if _has_math_verify() else [])):
        assert doctest.testmod(import_module(f"farthing.reasoning.{name}")).failed == 0


def _has_math_verify() -> bool:
    from importlib.util import find_spec

    return find_spec("math_verify") is not None
