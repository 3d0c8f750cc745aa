"""The command line as a user calls it: output, JSON, and exit codes (0 good, 2 wrong usage, 3 unusable model)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def farthing(*arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "farthing", *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.usefixtures("smollm2")
def test_generate_answers_and_prints_the_ledger() -> None:
    result = farthing("generate", "smollm2-135m", "--prompt", "What is the capital of France?", "-n", 32)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "37 tokens" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("smollm2")
def test_generate_reads_standard_input_and_writes_json() -> None:
    arguments = ("generate", "--raw", "--json", "-n", 5, "--stop", "ZZZ")
    result = farthing(*arguments, text="The capital of France is")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert "Paris" in answer["text"]
    assert len(answer["token_ids"]) == 5
    assert answer["finish_reason"] == "length"
    assert answer["ledger"]["prompt_tokens"] == 5
    assert json.loads(farthing(*arguments, text="The capital of France is").stdout)["token_ids"] == answer["token_ids"]


@pytest.mark.usefixtures("smollm2")
def test_chat_takes_a_turn_a_line() -> None:
    turns = "My name is Ada.\n\nWhat is the capital of France?\n"
    result = farthing("chat", "--temperature", 0, "-n", 40, "--ledger", text=turns)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert result.stderr.count("answer") >= 2  # a ledger for each of two turns


@pytest.mark.usefixtures("smollm2")
def test_plan_predicts_what_loading_finds() -> None:
    result = farthing("plan", "--json")
    assert result.returncode == 0, result.stderr
    predicted = json.loads(result.stdout)

    import farthing as ft

    assert predicted["resident_bytes"] == ft.LLM("smollm2-135m", context=64).explain().nbytes
    assert farthing("plan").stdout.count("\n") > 4


@pytest.mark.usefixtures("smollm2")
def test_bench_reports_speeds() -> None:
    result = farthing("bench", "--rounds", 1, "--json")
    assert result.returncode == 0, result.stderr
    speeds = json.loads(result.stdout)["speeds"]
    assert len(speeds) == 3
    assert all(speed["tokens_per_second"] > 0 for speed in speeds)


def test_doctor_examines_the_machine() -> None:
    result = farthing("doctor", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["isa"] in report["available_isas"]
    assert "scalar" in report["available_isas"]
    assert report["threads"] >= 1
    assert report["bandwidth"] > 1e8
    assert report["self_tests"]
    assert all(test["passed"] for test in report["self_tests"])
    assert {test["isa"] for test in report["self_tests"]} == set(report["available_isas"])
    plain = farthing("doctor")
    assert plain.returncode == 0
    for word in ("instruction set", "threads", "bandwidth", "self-tests"):
        assert word in plain.stdout


@pytest.mark.parametrize("command", ["generate", "chat", "doctor", "bench", "plan"])
def test_help(command: str) -> None:
    result = farthing(command, "--help")
    assert result.returncode == 0
    assert command in result.stdout


def test_version() -> None:
    import farthing as ft

    assert farthing("--version").stdout.strip() == f"farthing {ft.__version__}"


def test_wrong_usage_exits_with_2(tiny_directory: Callable[[str], Path]) -> None:
    model = tiny_directory("llama-2")
    for arguments in (
        ("no-such-command",),
        ("generate", model, "--no-such-option"),
        ("generate", model, "--prompt", "x", "--temperature", "-1"),
        ("generate", model, "--prompt", "x", "--top-p", "nan"),
        ("generate", model, "--prompt", "x", "--weights", "int5"),
        ("bench", model, "--rounds", "0"),
        ("plan", model, "--threads", "0"),
    ):
        result = farthing(*arguments)
        assert result.returncode == 2, (arguments, result.stdout, result.stderr)
        assert "Traceback" not in result.stderr


def test_unusable_model_exits_with_3(tmp_path: Path, tiny_directory: Callable[[str], Path]) -> None:
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(b"GGUF" + bytes(100))
    pickle = tmp_path / "pytorch_model.bin"
    pickle.write_bytes(b"\x80\x04.")
    for command in ("generate", "plan"):
        extra = ("--prompt", "x") if command == "generate" else ()
        for model in ("no-such-model", noise, pickle, tmp_path):
            result = farthing(command, model, *extra)
            assert result.returncode == 3, (command, model, result.stdout, result.stderr)
            assert result.stderr.startswith("error:")
            assert len(result.stderr.strip().splitlines()) == 1
    # A model without a tokenizer can't answer text.
    assert farthing("generate", tiny_directory("llama-2"), "--prompt", "x").returncode == 3


@pytest.mark.usefixtures("smollm2")
def test_forced_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARTHING_ISA", "scalar")
    assert json.loads(farthing("doctor", "--json").stdout)["isa"] == "scalar"
    monkeypatch.setenv("FARTHING_ISA", "pdp11")
    result = farthing("doctor")
    assert result.returncode != 0
    assert "FARTHING_ISA" in result.stderr
    assert "Traceback" not in result.stderr
