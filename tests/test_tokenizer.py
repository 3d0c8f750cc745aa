"""The tokenizer of a GGUF file against llama.cpp's, where that is installed, and its own round trip."""

from __future__ import annotations

import sys
from pathlib import Path

import farthing as ft
import pytest
from conftest import MODELS, ROOT

texts = pytest.importorskip("texts")

sys.path.insert(0, str(ROOT))
from benches.llama_cpp_library import LlamaCpp, PeerMissingError  # noqa: E402


def model(name: str, request: pytest.FixtureRequest) -> Path:
    if name == "smollm2":
        return request.getfixturevalue("smollm2")
    path = MODELS / name
    if not path.exists():
        pytest.skip(f"opt-in: FARTHING_MODELS with {name}")
    return path


@pytest.mark.parametrize(
    "name",
    [
        "smollm2",
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "gemma-3-270m-q4_k_m.gguf",
    ],
)
@pytest.mark.usefixtures("data")
def test_ids_equal_llama_cpp(name: str, request: pytest.FixtureRequest) -> None:
    """The tokenizer rebuilt from GGUF metadata gives llama.cpp's ids on at least 600 varied texts."""
    path = model(name, request)
    try:
        peer = LlamaCpp(path, threads=1, context=64)
    except PeerMissingError as error:
        pytest.skip(f"opt-in: {error}")
    tokenizer = ft.LLM(path, context=64, max_sequences=1).tokenizer
    varied = texts.varied_texts()
    assert len(varied) >= 600
    different = [text for text in varied if tokenizer.encode(text) != peer.tokenize(text)]
    assert not different, f"{len(different)} of {len(varied)} differ, the first: {different[0]!r}"
    for text in varied[:5]:
        assert tokenizer.encode(text, add_special_tokens=True) == peer.tokenize(text, add_special=True)


def test_round_trip(smollm2: Path) -> None:
    tokenizer = ft.LLM(smollm2, context=64, max_sequences=1).tokenizer
    for text in texts.varied_texts():
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
