r"""GSM8K answered with fewer tokens: accuracy against tokens, graded end to end, paired with no control.

``python -m benches.reasoning [test | tune | difficulty] [--model FILE] [--out DIRECTORY] [--items 400] [--check 16]``

Every way answers the same problems greedily, a shuffled head of GSM8K's test set (Cobbe et al., 2021). Tokens are all
that is computed behind the prompt: thinking, answer, forced text and probes. Answers are appended to a file as they
come, so a run that was stopped goes on where it was; what has been answered is only read. ``tune`` puts wordings of a
concise prompt and settings of policies to *training* items: what the test set sees is chosen there. ``difficulty`` is
the curves of truncation levels and of self-consistency that stops early.
``--check`` answers the first problems of each way again and fails if one answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import farthing as ft
from farthing.reasoning.comparison import compare, plot, table
from farthing.reasoning.consistency import Consensus, self_consistency
from farthing.reasoning.evaluation import answers
from farthing.reasoning.grading import Grade
from farthing.reasoning.levels import truncation_levels
from farthing.reasoning.report import Answer, Report, answer_of
from farthing.reasoning.tasks import CONCISE, PLAIN, Item, question, read_items

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("FARTHING_DATA", ROOT.parent / "shared" / "data"))
MODEL = "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
BLOCK = 80
# The model reasons in plain text, so its thinking begins at once and ends where it opens the answer's box.
END = "\\boxed{"
MESSAGE = "\n\nFinal answer: "
RESERVE = 16
BOX = "Put the final answer in \\boxed{}."
# Concise prompts that were tried, on training items.
WORDINGS = {
    "key steps": f"Solve this problem step by step, concisely: only the key steps, no headings, no code. {BOX}",
    "list": f"Reason briefly but completely: a short numbered list, one calculation on each line. {BOX}",
    "needed steps": (
        f"Be concise and correct. Give only the steps the answer depends on, without elaboration or repetition. {BOX}"
    ),
    "no plan": (
        "Solve this problem step by step in plain text. Keep every step to one short sentence with its calculation. Do"
        f" not restate the problem, do not plan, do not write code. {BOX}"
    ),
    "short lines": CONCISE,
    "plain lines": (
        "Solve this problem in plain text, without LaTeX and without code. Write one short line with its calculation"
        " for each step and nothing else, then the final answer in \\boxed{}."
    ),
    "numbered lines": (
        "Solve this problem. Write a numbered list: each line names one quantity and calculates it, such as"
        ' "1. Eggs left: 16 - 3 = 13". No other text. Then write the final answer in \\boxed{}.'
    ),
    "few lines": (
        "Solve this problem correctly in as few short lines as it needs, one calculation in each, without LaTeX,"
        " without code, without explanations. Then write the final answer in \\boxed{}."
    ),
}


@dataclass(frozen=True)
class Way:
    """A prompt, and how an answer is drawn."""

    instruction: str
    options: dict[str, Any] = field(default_factory=dict)

    def answer(self, llm: ft.LLM, items: list[Item], most: int, grader: ft.reasoning.Grader) -> Iterator[Answer]:
        params = ft.SamplingParams(max_tokens=most, **self.options)
        return answers(llm, items, params, grader, instruction=self.instruction)

    def ask(self, item: Item) -> list[dict[str, str]]:
        return [{"role": "user", "content": question(item, self.instruction)}]


@dataclass(frozen=True)
class Levels(Way):
    """Truncation levels: probed at each, ended where ``agree`` probes in a row agree."""

    agree: int = 2

    def answer(self, llm: ft.LLM, items: list[Item], most: int, grader: ft.reasoning.Grader) -> Iterator[Answer]:
        levels = [level for level in (48, 72, 108, 162, 243, 364) if level < most] + [most]
        for begin in range(0, len(items), 16):
            some = items[begin : begin + 16]
            for item, settled in zip(
                some, truncation_levels(llm, [self.ask(item) for item in some], levels, agree=self.agree), strict=True
            ):
                grade = grader.grade(item.answer, settled.text, truncated=settled.truncated).result()
                yield counted(
                    item, grade, settled.text, settled.thinking_tokens, settled.probe_tokens, settled.truncated
                )


@dataclass(frozen=True)
class Samples(Way):
    """Self-consistency that stops when decided, or under ``agree`` when likely enough."""

    samples: int = 5
    agree: float | None = None

    def answer(self, llm: ft.LLM, items: list[Item], most: int, grader: ft.reasoning.Grader) -> Iterator[Answer]:
        params = ft.SamplingParams(max_tokens=most, temperature=0.7, top_p=0.95, seed=0)

        def consensus(item: Item) -> Consensus:
            return self_consistency(llm, self.ask(item), self.samples, params, agree=self.agree, together=2)

        with ThreadPoolExecutor(8) as threads:  # so that the engine has 16 sequences
            for item, found in zip(items, threads.map(consensus, items), strict=True):
                text = "" if found.answer is None else f"\\boxed{{{found.answer}}}"
                cut = found.answer is None
                yield counted(item, grader.grade(item.answer, text).result(), text, found.tokens, 0, cut)


def counted(item: Item, grade: Grade, text: str, written: int, probes: int, truncated: bool) -> Answer:
    return Answer(item.id, 0, item.level, grade.outcome, grade.error, truncated, text, 0, 0, written, 0, probes, 0.0)


def capped(instruction: str, budget: int) -> Way:
    """A hard cap: the answer's box is dictated as soon as so many tokens have been written."""
    policy = ft.reasoning.Policy(end=END, message=MESSAGE, ramp=None, loop_guard=False, answer_reserve=RESERVE)
    return Way(instruction, {"thinking_budget": budget, "thinking": policy})


def soft(instruction: str, budget: int) -> Way:
    """A soft budget: behind it, the end of a sentence is awaited; what ends without a box gets one."""
    policy = ft.reasoning.Policy(end=END, message=MESSAGE, budget=budget, grace=24, answer_reserve=RESERVE)
    return Way(instruction, {"thinking": policy})


def early_exit(instruction: str, budget: int | None = None) -> Way:
    """Looks ahead at the end of every paragraph, and ends where the boxed answer has settled."""
    probe = ft.reasoning.Probe(until="}", confidence=0.995, answer_tokens=12)
    policy = ft.reasoning.Policy(
        end=END, message=MESSAGE, budget=budget, grace=24, ramp=None, answer_reserve=RESERVE, probe=probe
    )
    return Way(instruction, {"thinking": policy})


# Chosen on 150 training items, where the concise prompt alone has 62.7 % with 185 tokens: 280 gives 62.0 % with 178,
# 240 gives 60.0 % with 172.
BUDGET = 280
TEST = {
    "no control": Way(PLAIN),
    "concise prompt": Way(CONCISE),
    **{f"concise prompt, soft budget {budget}": soft(CONCISE, budget) for budget in (240, BUDGET)},
    "concise prompt, early exit": early_exit(CONCISE, BUDGET),
    "early exit": early_exit(PLAIN),
    **{f"hard cap {budget}": capped(PLAIN, budget) for budget in (120, 200, 280)},
    **{f"soft budget {budget}": soft(PLAIN, budget) for budget in (120, 200, 280)},
}
TRAIN = (
    {"no control": Way(PLAIN)}
    | {name: Way(text) for name, text in WORDINGS.items()}
    | {f"short lines, soft budget {budget}": soft(CONCISE, budget) for budget in (200, 240, 280, 320)}
)
# Computation by difficulty: two curves of accuracy against tokens, both lossy.
DIFFICULTY = (
    {"concise prompt": Way(CONCISE)}
    | {f"levels, {agree} agree": Levels(CONCISE, agree=agree) for agree in (1, 2, 3)}
    | {f"{count} samples": Samples(CONCISE, samples=count) for count in (3, 5, 9)}
    | {f"9 samples, posterior {agree}": Samples(CONCISE, samples=9, agree=agree) for agree in (0.8, 0.95)}
)
SETS = {"test": TEST, "tune": TRAIN, "difficulty": DIFFICULTY}


def problems(split: str, count: int) -> list[Item]:
    """The head of the shuffled set; a longer head begins with the shorter one."""
    items = read_items(DATA / "eval" / f"gsm8k_{split}.jsonl", "gsm8k")
    random.Random(0).shuffle(items)
    return items[:count]


def recorded(path: Path) -> dict[str, Answer]:
    """Answers in a file, by item; a line that was cut off by the end of a run is left out."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            answer = answer_of(json.loads(line))
        except ValueError:
            continue
        found[answer.item] = answer
    return found


class Runs:
    """Answers of all ways in a directory, one file each."""

    def __init__(self, directory: Path, model: Path, max_tokens: int, threads: int) -> None:
        self.directory, self.model, self.threads = directory, model, threads
        # Threads are not among them, since answers don't depend on them.
        settings = self.settings = {"model": model.name, "activations": "a8", "max_tokens": max_tokens}
        self._llm: ft.LLM | None = None
        directory.mkdir(parents=True, exist_ok=True)
        note = directory / "settings.json"
        if note.exists() and json.loads(note.read_text()) != settings:
            raise SystemExit(f"{note} is of {note.read_text()}, not of {settings}: choose another --out")
        note.write_text(json.dumps(settings))

    def path(self, name: str) -> Path:
        return self.directory / f"{name.replace(' ', '-').replace(',', '')}.jsonl"

    def report(self, name: str, items: list[Item]) -> Report | None:
        """What is recorded of these items."""
        found = recorded(self.path(name))
        rows = tuple(found[item.id] for item in items if item.id in found)
        return Report(name, rows, self.settings) if rows else None

    @property
    def llm(self) -> ft.LLM:
        if self._llm is None:
            self._llm = ft.LLM(
                self.model,
                activations=self.settings["activations"],
                threads=self.threads,
                max_sequences=16,
                context=2048,
                speculation=None,
            )
        return self._llm

    def answer(self, way: Way, items: list[Item], grader: ft.reasoning.Grader) -> Iterator[Answer]:
        return way.answer(self.llm, items, self.settings["max_tokens"], grader)

    def run(self, name: str, way: Way, items: list[Item], grader: ft.reasoning.Grader) -> None:
        """Answers what is not recorded yet."""
        done = recorded(self.path(name))
        left = [item for item in items if item.id not in done]
        if not left:
            return
        begin, tokens = perf_counter(), 0
        with self.path(name).open("a", encoding="utf-8") as file:
            for number, answer in enumerate(self.answer(way, left, grader), 1):
                file.write(json.dumps(asdict(answer)) + "\n")
                file.flush()
                tokens += answer.tokens
                if number % 25 == 0 or number == len(left):
                    rate = tokens / (perf_counter() - begin)
                    print(f"{name}: {len(done) + number} of {len(items)}, {rate:.0f} tok/s", flush=True)

    def check(self, name: str, way: Way, items: list[Item], grader: ft.reasoning.Grader) -> None:
        """Answers again; whatever is not as recorded ends the program."""
        before = recorded(self.path(name))
        for answer in self.answer(way, items, grader):
            old = before[answer.item]
            if (answer.text, answer.tokens, answer.outcome) != (old.text, old.tokens, old.outcome):
                raise SystemExit(f"{name}: item {answer.item} was answered otherwise: {answer} is not {old}")
        print(f"{name}: {len(items)} problems answered again, all the same", flush=True)


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("set", nargs="?", default="test", choices=list(SETS))
    parser.add_argument("--model", type=Path, default=Path(os.environ.get("FARTHING_MODELS", "")) / MODEL)
    parser.add_argument("--out", type=Path, default=Path("reasoning-runs"), help="where answers are kept")
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--ways", nargs="+", help="only these")
    parser.add_argument("--check", type=int, default=0, help="answer so many problems of each way again")
    parser.add_argument("--read", action="store_true", help="answer nothing, show what is recorded")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    ways = SETS[arguments.set]
    if unknown := set(arguments.ways or []) - set(ways):
        parser.error(f"--ways: got {', '.join(sorted(unknown))}, expected any of {', '.join(ways)}")
    chosen = {name: way for name, way in ways.items() if not arguments.ways or name in arguments.ways}
    split = "train" if arguments.set == "tune" else "test"
    items = problems(split, arguments.items)
    runs = Runs(arguments.out / split, arguments.model, arguments.max_tokens, arguments.threads)
    if not arguments.read:
        with ft.reasoning.Grader(workers=1, seconds=60) as grader:
            # In blocks, so that a run that is stopped leaves all ways equally far.
            for end in range(BLOCK, len(items) + BLOCK, BLOCK):
                for name, way in chosen.items():
                    runs.run(name, way, items[:end], grader)
            for name, way in chosen.items() if arguments.check else ():
                runs.check(name, way, items[: arguments.check], grader)
    reports = [report for name in chosen if (report := runs.report(name, items))]
    if not reports:
        raise SystemExit("nothing is recorded yet")
    base = runs.report("no control", items)
    print(f"\nGSM8K {split}, {arguments.model.name}, greedy, at most {arguments.max_tokens} tokens\n")
    print(table(reports, base))
    figures = {
        report.name: report.summary() | ({"against no control": asdict(compare(report, base))} if base else {})
        for report in reports
    }
    (runs.directory / f"{arguments.set}-figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    try:
        plot(reports, runs.directory / f"{arguments.set}-plot.png")
    except ImportError as error:
        print(f"no plot: {error}")


if __name__ == "__main__":
    main()
