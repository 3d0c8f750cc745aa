"""What installing and importing farthing costs, and what the wheel holds."""

import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import farthing as ft
import pytest

ROOT = Path(__file__).parents[2]


def fresh(code):
    """Runs code in a new interpreter; its output."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_loads_nothing_heavy():
    code = "import sys, farthing; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(fresh(code).split())
    assert not loaded & {"torch", "transformers", "huggingface_hub", "rich", "typer", "matplotlib", "numpy"}


def test_using_a_model_loads_no_torch():
    code = "import sys, farthing as ft; ft.LLM, ft.SamplingParams(); print(*sys.modules)"
    loaded = {name.split(".")[0] for name in fresh(code).split()}
    assert not loaded & {"torch", "transformers", "huggingface_hub", "rich", "typer"}


def test_the_public_names_are_there():
    assert set(ft.__all__) <= set(dir(ft))
    for name in ft.__all__:
        assert getattr(ft, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ft.nonsense


def test_the_base_install_is_small():
    base = [line for line in requires("farthing") if "extra ==" not in line]
    names = {line.split(">")[0].split("=")[0].strip().lower() for line in base}
    assert names == {"numpy", "typer", "rich", "huggingface_hub"} or names == {
        "numpy",
        "typer",
        "rich",
        "huggingface-hub",
    }


def test_the_wheel_is_small_and_complete():
    wheels = list((ROOT / "dist").glob("farthing-*.whl"))
    if not wheels:
        pytest.skip("needs `make wheel`")
    (wheel,) = wheels
    assert "cp310-abi3" in wheel.name
    assert wheel.stat().st_size <= 15_000_000
    names = zipfile.ZipFile(wheel).namelist()
    assert {"farthing/py.typed", "farthing/_core.pyi", "farthing/cli/__init__.py"} <= set(names)
    assert sum(name.endswith(".so") for name in names) == 1
    assert not [name for name in names if name.startswith(("tests/", "benches/"))]


def test_show_versions(capsys):
    ft.show_versions()
    printed = capsys.readouterr().out
    for word in ("farthing", "python", "numpy", "isa", "threads"):
        assert word in printed
