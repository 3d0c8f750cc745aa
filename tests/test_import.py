"""What the base install costs: import time, what is imported, and the size of the wheel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# Everything a user touches before a model is loaded.
TOUCH = "import farthing; farthing.LLM; farthing.SamplingParams; farthing.FormatError; farthing.quantize"


def python(script: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def test_import_is_quick() -> None:
    """At most 50 ms beyond numpy: the best of seven fresh processes, so that a busy machine does not decide."""
    script = f"import numpy; from time import perf_counter as now; start = now(); {TOUCH}; print(now() - start)"
    assert min(float(python(script)) for _ in range(7)) <= 0.050


def test_import_is_light() -> None:
    """Neither the libraries farthing plugs into nor those of its command line are imported."""
    loaded = json.loads(python(f"{TOUCH}; import json, sys; print(json.dumps(sorted(sys.modules)))"))
    heavy = {
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "huggingface_hub",
        "typer",
        "rich",
        "requests",
        "httpx",
    }
    assert heavy.isdisjoint(loaded)


def test_import_itself_imports_nothing() -> None:
    loaded = json.loads(python("import farthing, json, sys; print(json.dumps(sorted(sys.modules)))"))
    assert "numpy" not in loaded


def test_every_public_name_is_there() -> None:
    import farthing as ft

    assert all(getattr(ft, name) is not None for name in ft.__all__)
    assert set(ft.__all__) <= set(dir(ft))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ft.no_such_name


def test_version_is_the_wheels() -> None:
    from importlib.metadata import version

    import farthing as ft

    assert ft.__version__ == version("farthing")


def wheels() -> list[Path]:
    return sorted((ROOT / "dist").glob("farthing-*.whl"))


@pytest.mark.skipif(not wheels(), reason="no wheel in dist (make wheel)")
def test_wheel_is_small_and_for_every_python() -> None:
    for wheel in wheels():
        assert wheel.stat().st_size <= 15_000_000
        assert "-abi3-" in wheel.name
