"""Experts larger than memory: the same bits whatever is in memory, and nothing believed that is damaged."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import farthing as ft
import numpy as np
import pytest
import tiny
from farthing.plan import plan
from farthing.sizes import byte_count

MODELS = ["mixtral", "qwen3-moe", "qwen3-moe-mixed", "qwen2-moe", "olmoe", "granite-moe", "gpt-oss", "deepseek-v3"]
Directory = Callable[[str], Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of the test's own; where the stores lie in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "farthing" / "experts"


def routed(model: ft.LLM) -> int:
    """Bytes of the experts that tokens are sent to."""
    return sum(row.nbytes for row in model.explain() if row.role.startswith("expert"))


def answers(model: ft.LLM) -> list[tuple[int, ...]]:
    """What eight requests at once are answered."""
    params = [ft.SamplingParams(max_tokens=12, temperature=0.5 * (i % 2), seed=i, ignore_eos=True) for i in range(8)]
    prompts = [tiny.prompt(3 + 9 * i) for i in range(8)]
    return [tuple(answer.token_ids) for answer in model.generate(prompts, params)]


def store(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


@pytest.mark.parametrize("weights", ["f32", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_budgets_change_no_bit(name: str, weights: str, tiny_directory: Directory) -> None:
    directory, ids = tiny_directory(name), tiny.prompt(70)
    resident = ft.LLM(directory, weights=weights, threads=2)
    expected, tokens, total = resident.logits(ids), answers(resident), routed(resident)
    for share in (0.3, 0.6, 1.0):
        # In the smallest models a third of the experts may be less than a token uses.
        try:
            model = ft.LLM(directory, weights=weights, threads=2, expert_memory=int(share * total))
        except ValueError as error:
            assert share < 0.5
            found = re.search(r"at least (\d+) bytes", str(error))
            assert found
            model = ft.LLM(directory, weights=weights, threads=2, expert_memory=int(found[1]))
        assert np.array_equal(model.logits(ids), expected)
        assert answers(model) == tokens
        ledger = model.ledger
        assert ledger.expert_misses > 0
        assert (ledger.expert_hits > 0) or share < 1
        assert (ledger.expert_evictions > 0) == (share < 1)
        assert ledger.expert_right_guesses <= ledger.expert_guesses
        assert ledger.weight_bytes >= resident.ledger.weight_bytes // 4
    assert resident.ledger.expert_misses == 0


def test_eight_threads_ask_at_once(tiny_directory: Directory) -> None:
    from concurrent.futures import ThreadPoolExecutor

    directory = tiny_directory("olmoe")
    resident = ft.LLM(directory)
    model = ft.LLM(directory, expert_memory=routed(resident) * 2 // 5, threads=8)

    def ask(i: int) -> list[int]:
        return list(
            model.generate(tiny.prompt(5 + 7 * i), ft.SamplingParams(max_tokens=30, ignore_eos=True))[0].token_ids
        )

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    params = ft.SamplingParams(max_tokens=30, ignore_eos=True)
    expected = resident.generate([tiny.prompt(5 + 7 * i) for i in range(8)], params)
    assert found == [list(answer.token_ids) for answer in expected]


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe-mixed", "qwen2-moe", "deepseek-v3"])
def test_plan_and_explain_say_what_is_in_memory_and_what_on_disk(name: str, tiny_directory: Directory) -> None:
    directory = tiny_directory(name)
    resident = ft.LLM(directory, weights="int8")
    all_bytes, experts = resident.explain().nbytes, routed(resident)
    assert resident.explain().disk_bytes == 0
    assert "disk" not in str(resident.explain())
    for budget, kept in ((experts * 3 // 4, experts * 3 // 4), (10 * experts, experts)):
        explained = ft.LLM(directory, weights="int8", expert_memory=budget).explain()
        foretold = plan(directory, weights="int8", expert_memory=budget)
        for found in (explained, foretold.matrices):
            assert (found.nbytes, found.disk_bytes) == (all_bytes, experts)
            assert found.resident_bytes == all_bytes - experts + kept
            assert {matrix.role for matrix in found if matrix.on_disk} == {"expert_gate", "expert_up", "expert_down"}
            assert "expert_up (disk)" in str(found)
        assert (foretold.resident_bytes, foretold.disk_bytes) == (explained.resident_bytes, experts)
        (share,) = {row.used / row.count for row in explained if row.on_disk}
        used = sum(row.nbytes // row.count * row.used for row in explained if row.on_disk)
        found = next(1 - (1 - share) ** tokens for tokens in range(99, -1, -1) if 1 - (1 - share) ** tokens < 0.75)
        assert foretold.bytes_per_token == plan(directory, weights="int8").bytes_per_token
        assert abs(foretold.disk_bytes_per_token - used * (0 if kept == experts else 1 - found)) <= len(explained)
        assert "fetched from disk per token" in str(foretold)
        assert "experts on disk" in str(foretold)
    with pytest.raises(ValueError, match="at least"):
        plan(directory, expert_memory=1000)
    with pytest.raises(ft.UnsupportedError, match="without experts"):
        plan(tiny_directory("qwen3"), expert_memory="1GB")


def test_too_little_memory_says_what_works(tiny_directory: Directory) -> None:
    directory = tiny_directory("mixtral")
    with pytest.raises(ValueError, match=r"expert_memory: got 1000 bytes, expected at least \d+ bytes") as caught:
        ft.LLM(directory, expert_memory=1000)
    least = int(re.findall(r"\d+", str(caught.value))[1])
    assert len(ft.LLM(directory, expert_memory=least).generate(tiny.prompt(5))) == 1
    with pytest.raises(ValueError, match="expert_memory"):
        ft.LLM(directory, expert_memory=least - 1)
    with pytest.raises(ft.UnsupportedError, match="without experts"):
        ft.LLM(tiny_directory("qwen3"), expert_memory="1GB")
    for wrong in (0, -1, True, "2 potatoes", "", "0.0GB", 1.5):
        with pytest.raises(ValueError, match="expert_memory"):
            ft.LLM(directory, expert_memory=wrong)  # type: ignore[arg-type]


def test_sizes() -> None:
    sizes = {"2GB": 2 * 10**9, "1.5 GiB": 3 << 29, "500mib": 500 << 20, "4096": 4096, "3 kB": 3000}
    assert {text: byte_count("size", text) for text in sizes} == sizes


def test_a_store_is_packed_once_and_again_for_a_changed_model(cache: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    tiny.build(next(model for model in tiny.MODELS if model.name == "olmoe"), directory)
    expected = ft.LLM(directory).logits(tiny.prompt(20))

    def packed() -> tuple[int, int]:
        assert np.array_equal(ft.LLM(directory, expert_memory="1GB").logits(tiny.prompt(20)), expected)
        status = store(cache).stat()
        return status.st_ino, status.st_mtime_ns

    first = packed()
    assert packed() == first
    os.utime(directory / "model.safetensors")
    assert packed() != first


KILLED = """
import os, signal, sys, time
import farthing as ft
calls = 0
def progress(*_):
    global calls
    calls += 1
    time.sleep(0.11)  # progress is told ten times a second
    if calls == 4:
        os.kill(os.getpid(), signal.SIGKILL)
ft.LLM(sys.argv[1], expert_memory="1GB", threads=1, progress=progress)
"""


def test_killed_while_packing(tiny_directory: Directory, cache: Path) -> None:
    directory = tiny_directory("mixtral")
    expected = answers(ft.LLM(directory))
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", KILLED, directory], capture_output=True, timeout=60)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert [path.suffix for path in cache.iterdir()] == [".unfinished"]
    assert answers(ft.LLM(directory, expert_memory="1GB")) == expected
    assert store(cache).suffix != ".unfinished"


def test_damaged_stores_are_packed_anew(tiny_directory: Directory, cache: Path) -> None:
    directory = tiny_directory("mixtral")

    def logits() -> object:
        return ft.LLM(directory, expert_memory="1GB").logits(tiny.prompt(20)).tobytes()

    expected = ft.LLM(directory).logits(tiny.prompt(20)).tobytes()
    assert logits() == expected
    path = store(cache)
    good = path.read_bytes()
    assert b"mixtral" in good[:4096]
    damages = [b"", good[:100], good[:-1], good + b"\0", b"GGUF" + good[4:], good.replace(b"mixtral", b"mixtrel", 1)]
    damages += [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in (0, 16, 40, 400)]
    for damage in damages:
        path.write_bytes(damage)
        assert logits() == expected
        assert path.read_bytes() == good


def test_a_damaged_expert_is_found_when_it_is_read(tiny_directory: Directory, cache: Path) -> None:
    directory = tiny_directory("mixtral")
    expected = answers(ft.LLM(directory, expert_memory="1GB"))
    path = store(cache)
    bytes_ = bytearray(path.read_bytes())
    bytes_[4096 * (len(bytes_) // 8192)] ^= 16  # the first byte of an expert in the middle
    path.write_bytes(bytes_)
    model = ft.LLM(directory, expert_memory="1GB")
    with pytest.raises(ft.FarthingError, match="damaged"):
        answers(model)
    assert not path.exists()
    assert answers(ft.LLM(directory, expert_memory="1GB")) == expected


def read_bytes() -> int:
    """Bytes that this process has had read from disks."""
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_experts_come_from_the_disk(tiny_directory: Directory, tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.write_bytes(os.urandom(1 << 16))
    with probe.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = read_bytes() if Path("/proc/self/io").exists() else 0
        file.read()
    if not Path("/proc/self/io").exists() or read_bytes() == before:
        pytest.skip("this file system does not account for reads")
    directory = tiny_directory("mixtral")
    total = routed(ft.LLM(directory, weights="f32"))
    model = ft.LLM(directory, weights="f32", expert_memory=total // 2)
    before = read_bytes()
    answers(model)
    # Pages of the system's own reading ahead may have come before.
    assert read_bytes() - before > model.ledger.expert_bytes // 2 > 0
