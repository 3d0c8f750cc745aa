"""The command line: what it prints where, and its exit codes."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.usefixtures("smollm2")


def farthing(*arguments, stdin="", **environment):
    """Runs the command; no terminal, so no bars and no colours."""
    return subprocess.run(
        [sys.executable, "-m", "farthing", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", **environment},
        timeout=120,
    )


def test_generate_answers_and_prints_the_ledger():
    done = farthing("generate", "--prompt", "What is the capital of France?")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "ledger" in done.stderr
    assert "weights read" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_generate_reads_standard_input_and_prints_json():
    done = farthing("generate", "smollm2-135m", "--raw", "--json", "-n", "8", stdin="The capital of France is")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["text"].startswith(" Paris")
    assert answer["finish_reason"] == "length"
    assert answer["ledger"]["answer_tokens"] == len(answer["token_ids"]) == 8
    assert done.stderr == ""


def test_a_seed_fixes_a_sample():
    arguments = ("generate", "-p", "Tell me a story.", "-n", "12", "-t", "1.0", "--seed", "4", "--json")
    first, second = (json.loads(farthing(*arguments).stdout) for _ in range(2))
    assert first["token_ids"] == second["token_ids"]


def test_chat_takes_every_line_as_a_turn():
    done = farthing("chat", "-t", "0", "-n", "24", "--ledger", stdin="What is the capital of France?\nAnd of Italy?\n")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert done.stderr.count("weights read") == 2


def test_doctor_reports():
    done = farthing("doctor")
    assert done.returncode == 0, done.stderr
    for word in ("instruction set", "threads", "memory bandwidth", "int8 rate", "self-tests", "python", "smollm2-135m"):
        assert word in done.stdout
    report = json.loads(farthing("doctor", "--json").stdout)
    assert report["bandwidth"] > 1e8
    assert report["self_tests"]
    assert all(test["passed"] for test in report["self_tests"])


def test_doctor_tells_of_a_forced_instruction_set():
    done = farthing("doctor", FARTHING_ISA="scalar")
    assert done.returncode == 0
    assert "scalar" in done.stdout
    assert "no vector instructions" in done.stderr
    wrong = farthing("doctor", FARTHING_ISA="avx1024")
    assert wrong.returncode == 2
    assert wrong.stderr.strip().startswith("error: FARTHING_ISA: got")


def test_plan_predicts_without_loading():
    done = farthing("plan", "--matrices")
    assert done.returncode == 0, done.stderr
    for word in ("weights in memory", "keys and values per token", "tok/s", "head"):
        assert word in done.stdout
    found = json.loads(farthing("plan", "--json", "--weights", "f32").stdout)
    assert found["family"] == "llama"
    assert found["bytes_per_token"] > 5e8


def test_bench_measures():
    done = farthing("bench", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    speeds = json.loads(done.stdout)["speeds"]
    assert [speed["work"] for speed in speeds] == ["prompt-16", "prompt-512", "decode-128"]
    assert all(speed["tokens_per_second"] > 0 for speed in speeds)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("generate", "-p", "x", "--no-such-option"), 2, "--no-such-option"),
        (("generate", "-p", "x", "-n", "0"), 2, "max_tokens: got 0"),
        (("generate", "-p", "x", "-n", "many"), 2, "--max-tokens"),
        (("generate", "-p", "x", "--top-p", "2"), 2, "top_p: got 2"),
        (("generate", "-p", "x", "--weights", "int5"), 2, "weights: got"),
        (("generate", "-p", "x", "--weights", "ternary"), 3, "is not supported"),
        (("generate", "no-such-model", "-p", "x"), 3, "expected an existing .gguf file"),
        (("generate", "-p", "", "--raw"), 2, "prompt: got no tokens"),
        (("plan", "no-such-model"), 3, "no-such-model"),
        (("nonsense",), 2, "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_use_is_one_clean_message(arguments, code, message):
    done = farthing(*arguments)
    assert done.returncode == code, done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_damaged_file_is_one_clean_line(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
    done = farthing("generate", str(path), "-p", "x")
    assert done.returncode == 3
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ")


def test_too_little_memory_is_one_clean_line():
    command = f"ulimit -v 1000000; exec {sys.executable} -m farthing generate --weights f32 --context 64 -p x"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 4, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ")


def test_help_and_version():
    assert "generate" in farthing("--help").stdout
    assert "--max-tokens" in farthing("generate", "--help").stdout
    assert farthing("--version").stdout.startswith("farthing 0.")


def test_a_reader_who_leaves_early_is_no_error():
    command = f"{sys.executable} -m farthing generate -p 'Tell me a long story.' -n 64 2>/dev/null | head -c 5"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 5


def test_chat_at_a_terminal_stops_at_ctrl_c_and_ends_at_ctrl_d():
    steps = [
        (lambda seen: seen.endswith("> "), b"Write a very long story about a cat.\n"),
        (lambda seen: len(seen.partition("about a cat.")[2]) > 40, b"\x03"),
        (lambda seen: seen.endswith("\n> "), b"\x04"),
    ]
    process, terminal = pty.fork()
    if process == 0:
        os.environ["NO_COLOR"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "farthing", "chat", "-t", "0", "-n", "1500"])
    seen, deadline = "", time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                seen += os.read(terminal, 4096).decode(errors="replace").replace("\r", "")
            except OSError:  # the other end is gone
                break
        if steps and steps[0][0](seen):
            os.write(terminal, steps.pop(0)[1])
    else:
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert (steps, os.waitstatus_to_exitcode(status)) == ([], 0), seen
    assert "\x1b[3" not in seen  # no colours
