"""One low-bit matrix product beside its peers, in one process, interleaved.

``python -m benches.matmul_peers [--format int4|ternary] [--shape 4096 4096] [--rows 1 4 512] [--isa avx2]``

Every engine holds as many matrices as are four times the last cache and sweeps over all of them, so that weights
come from memory. A visit to an engine is a pause, one sweep to warm up and a few that are timed; engines take turns,
the machine's limits are probed between the rounds, and medians are reported. Before anything is timed, every output of
every engine is compared with the float64 product of the weights as that engine rounded them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np
import numpy.typing as npt

from .llama_cpp_library import PeerMissingError
from .matmul_engines import ENGINES, TOLERANCE, Engine, Sweep

ROWS = [1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 512]
# Threads of an engine spin for a while after its last operation (OpenMP's for up to 10 ms) and would take a processor
# from the next one. Pausing lets them sleep; the sweep that is not timed wakes the next engine's.
PAUSE = 0.015
VISIT = 0.02  # seconds of timed sweeps in one visit, at least one sweep
PROBE_EVERY = 3  # rounds
Times = dict[int, dict[str, list[float]]]


@dataclass(frozen=True)
class Round:
    """The machine's limits, and the seconds of one product by engine in the round that followed."""

    bandwidth: float
    int8_rate: float
    seconds: dict[str, float]


class WrongResultError(RuntimeError):
    """An engine's output is not the product."""


def check(
    name: str, output: npt.NDArray[np.floating[Any]], expected: npt.NDArray[np.float64], tolerance: float
) -> None:
    """Raises WrongResultError unless ``output`` is ``expected`` (M, N) but for rounding.

    The root mean square error is within ``tolerance`` of the root mean square of what is expected, and no single
    error is beyond eight times that: one wrong output among millions is found.
    """
    if output.shape != expected.shape:
        raise WrongResultError(f"{name}: shape {output.shape}, expected {expected.shape}")
    size = np.sqrt(np.mean(expected**2))
    error = np.abs(output - expected)
    mean, largest = np.sqrt(np.mean(error**2)) / size, error.max() / size
    if not (mean <= tolerance and largest <= 8 * tolerance):
        raise WrongResultError(f"{name}: error {mean:.2e}, largest {largest:.2e}, of the outputs' root mean square")


def limit_isa(isa: str) -> None:
    """Holds every engine that can be held at an instruction set; before any of them is imported."""
    if isa != "avx2":
        raise SystemExit(f"--isa {isa}: only avx2 is a limit that the peers know")
    os.environ.update({"FARTHING_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"})
    print("limited to AVX2: farthing, torch and ggml. ONNX Runtime has no such option: it runs as ever.")


def level_memory() -> None:
    """Keeps freed outputs in the process, so that no engine pays the system for fresh pages and another does not."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def last_cache() -> int:
    """Bytes of the largest cache, 32 MiB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [int(path.read_text().strip().removesuffix("K")) * 1024 for path in sizes]
    return max(found, default=32 << 20)


def draw(shape: tuple[int, int], kind: str, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """Weights (N, K): normal, or 0 and ± one number."""
    scale = shape[1] ** -0.5
    if kind == "ternary":
        return random.integers(-1, 2, shape).astype(np.float32) * np.float32(scale)
    return random.standard_normal(shape, dtype=np.float32) * np.float32(scale)


def verify(name: str, engine: Engine, x: npt.NDArray[np.float32], rows: list[int]) -> None:
    """Checks every output of the engine for every number of rows."""
    expected = x.astype(np.float64) @ engine.exact.T
    for m in rows:
        sweep = engine.sweep(x[:m])
        for i, output in enumerate(sweep.read(sweep.run())):
            check(f"{name}, {m} rows, matrix {i}", output, np.roll(expected[:m], i, 1), TOLERANCE[engine.precision])


def visit(run: Callable[[], Any], copies: int) -> list[float]:
    """Seconds for one product, of each timed sweep."""
    sleep(PAUSE)
    run()
    times: list[float] = []
    while not times or sum(times) * copies < VISIT:
        start = perf_counter()
        run()
        times.append((perf_counter() - start) / copies)
    return times


def measure(
    engines: dict[str, Engine], x: npt.NDArray[np.float32], rows: list[int], copies: int, threads: int, seconds: float
) -> tuple[Times, dict[int, list[Round]]]:
    """Seconds by number of rows and engine, and the rounds in which the limits were probed."""
    from farthing import machine

    times: Times = {}
    probed: dict[int, list[Round]] = {}
    for m in rows:
        sweeps: dict[str, Sweep] = {name: engine.sweep(x[:m]) for name, engine in engines.items()}
        times[m], probed[m] = {name: [] for name in engines}, []
        names, turn, start = list(engines), 0, perf_counter()
        while turn < 3 or perf_counter() - start < seconds:
            probe = machine.measure(threads) if turn % PROBE_EVERY == 0 else None
            visits = {}
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                visits[name] = visit(sweeps[name].run, copies)
                times[m][name] += visits[name]
            if probe:
                medians = {name: median(values) for name, values in visits.items()}
                probed[m].append(Round(probe.bandwidth, probe.int8_rate, medians))
            turn += 1
    return times, probed


def summary(
    times: Times, probed: dict[int, list[Round]], shape: tuple[int, int], nbytes: int | None
) -> list[dict[str, Any]]:
    """Medians and what follows from them, for each number of rows."""
    found = []
    for m, by_engine in times.items():
        medians = {name: median(values) for name, values in by_engine.items()}
        bandwidth, rate = (median(getattr(turn, name) for turn in probed[m]) for name in ("bandwidth", "int8_rate"))
        row: dict[str, Any] = {"rows": m, "seconds": medians, "bandwidth": bandwidth, "int8_rate": rate}
        ours = medians.get("farthing")
        peers = {name: seconds for name, seconds in medians.items() if name != "farthing"}
        if ours is not None and nbytes is not None:
            operations = 2 * m * shape[0] * shape[1]
            # Against the limits of the same round: the neighbours move them from one second to the next.
            row["of_limit"] = median(
                max(nbytes / turn.bandwidth, operations / turn.int8_rate) / turn.seconds["farthing"]
                for turn in probed[m]
            )
            row["of_int8"] = median(operations / turn.int8_rate / turn.seconds["farthing"] for turn in probed[m])
            first = found[0]["seconds"]["farthing"] if found else ours
            row["growth"] = ours / first
            # What small batches should cost at most: one row's time, or the operations at 80 % of the rate.
            row["over_floor"] = ours / max(first, operations / rate / 0.8)
            if peers:
                row["best_peer"] = min(peers, key=lambda name: peers[name])
                row["times_best_peer"] = peers[row["best_peer"]] / ours
        found.append(row)
    best = max(row["int8_rate"] for row in found)
    for row in found:
        row["disturbed"] = row["int8_rate"] < 0.85 * best
    return found


def show(found: list[dict[str, Any]], names: list[str], title: str) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    caption = "µs for one product; ratios are the peer's time over farthing's"
    if any(row["disturbed"] for row in found):
        caption += "; * other work took processor time"
    table = Table(title=title, caption=caption)
    for heading in ("rows", *names, "best peer", "ratio", "of limit", "of int8", "÷ 1 row", "÷ floor", "GB/s", "TOP/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found:
        cells = [
            f"{'*' if row['disturbed'] else ''}{row['rows']}",
            *(f"{row['seconds'][name] * 1e6:.0f}" for name in names),
            row.get("best_peer", ""),
        ]
        for key, form in (("times_best_peer", ".2f"), ("of_limit", ".0%"), ("of_int8", ".0%"), ("growth", ".2f")):
            cells.append(format(row[key], form) if key in row else "")
        cells += [format(row["over_floor"], ".2f") if "over_floor" in row else ""]
        table.add_row(*cells, f"{row['bandwidth'] / 1e9:.0f}", f"{row['int8_rate'] / 1e12:.2f}")
    Console(width=max(100, 60 + 16 * (len(names) + 2))).print(table)


def plot(found: list[dict[str, Any]], names: list[str], shape: tuple[int, int], title: str, path: Path) -> None:
    """Draws time and GFLOP/s over the number of rows."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("skipped the plot: matplotlib is not installed")
        return
    rows = [row["rows"] for row in found]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in names:
        seconds = np.array([row["seconds"][name] for row in found])
        width = 2.5 if name == "farthing" else 1.2
        left.plot(rows, seconds * 1e6, marker="o", markersize=3, linewidth=width, label=name)
        right.plot(
            rows, 2e-9 * np.array(rows) * shape[0] * shape[1] / seconds, marker="o", markersize=3, linewidth=width
        )
    right.plot(rows, [row["int8_rate"] / 1e9 for row in found], color="grey", linestyle=":", label="int8 rate")
    for axes, label in ((left, "µs"), (right, "GFLOP/s")):
        axes.set(xscale="log", yscale="log", xlabel="rows", ylabel=label)
        axes.set_xticks(rows, [str(m) for m in rows])
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def build(
    names: list[str], weights: npt.NDArray[np.float32], kind: str, copies: int, threads: int, isa: str | None
) -> dict[str, Engine]:
    """The engines that are installed and know the format."""
    engines: dict[str, Engine] = {}
    for name in names:
        options = {"cpu": "haswell"} if name == "ggml" and isa else {}
        if name == "OpenVINO" and isa:
            print("skipped OpenVINO: limited, it fails, since only one of its parts hears of the limit")
            continue
        try:
            engines[name] = ENGINES[name](weights, kind, copies, threads, **options)
        except (ImportError, PeerMissingError) as error:
            print(f"skipped {name}: {error}")
    return engines


def main() -> None:
    """Parses the command line, checks, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="int4", choices=["int4", "ternary"])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], metavar=("N", "K"))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", help="limit the engines to avx2")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each number of rows, three rounds at least")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw time and GFLOP/s over rows here")
    arguments = parser.parse_args()
    if arguments.isa:
        limit_isa(arguments.isa)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    level_memory()

    shape, rows = tuple(arguments.shape), sorted(set(arguments.rows))
    random = np.random.default_rng(0)
    weights = draw(shape, arguments.format, random)
    copies = -(-4 * last_cache() // (shape[0] * shape[1] * (4 if arguments.format == "int4" else 2) // 8))
    engines = build(arguments.engines, weights, arguments.format, copies, arguments.threads, arguments.isa)
    # Numbers that bfloat16 holds too: every engine is given the same.
    x = random.standard_normal((max(rows), shape[1]), dtype=np.float32)
    x = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    for name, engine in engines.items():
        verify(name, engine, x, rows)
        del engine.exact
    times, probed = measure(engines, x, rows, copies, arguments.threads, arguments.seconds)
    nbytes = engines["farthing"].nbytes if "farthing" in engines else None
    found = summary(times, probed, shape, nbytes)
    title = f"{arguments.format} {shape[0]}×{shape[1]}, {copies} matrices, {arguments.threads} threads"
    show(found, list(engines), title + (f", {arguments.isa}" if arguments.isa else ""))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    if arguments.plot:
        plot(found, list(engines), shape, title, arguments.plot)


if __name__ == "__main__":
    main()
