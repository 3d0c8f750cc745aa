"""One real run of on-policy self-distillation: GSM8K's training questions, then tokens and accuracy on its test set.

``python -m benches.opsdc --model DIRECTORY [--data DIRECTORY] [--out opsdc-run] [--steps 100] [--batch 16]``, or
``make opsdc MODEL=DIRECTORY``

The model is a checkpoint of transformers (floats) with a chat template; the data folder holds ``gsm8k_train.jsonl`` and
``gsm8k_test.jsonl``. Answers while training come from farthing's engine, from a copy of the weights that is renewed
every ``--fresh`` steps. The run can be stopped at any time and goes on where it was saved. Then the test questions
are answered greedily by the model as it was, by the same with the concise prompt alone, and by the trained one; a table
goes to ``report.json`` and to the screen. Intervals are of paired differences, by bootstrap.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import farthing as ft
import torch
from farthing.reasoning import DIFFICULTY_AWARE, UNIFORM, EngineRollouts, Opsdc, Schedule, chat_pairs
from farthing.reasoning.rollouts import save_checkpoint
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PAIRS = {"difficulty": DIFFICULTY_AWARE, "uniform": UNIFORM}
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


def questions(path: Path) -> list[tuple[str, float]]:
    """Questions and their final numbers."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["question"], float(line["answer"].rpartition("####")[2].replace(",", ""))) for line in lines]


def final_number(text: str) -> float | None:
    """The last number of the last ``Answer:`` line, else of the text."""
    _, found, rest = text.rpartition("Answer:")
    numbers = NUMBER.findall(rest.splitlines()[0] if found and rest.strip() else text)
    return float(numbers[-1].replace(",", "").rstrip(".")) if numbers else None


def bar() -> Progress:
    """A bar with a line of figures."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def evaluate(
    directory: str | Path, which: int, tests: list[tuple[str, float]], options: argparse.Namespace, record: Path
) -> list[dict[str, Any]]:
    """Answers every test question with prompt ``which`` of the pair; what is recorded already is not done again."""
    from transformers import AutoTokenizer

    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    if len(done) >= len(tests):
        return done[: len(tests)]
    prompts = chat_pairs(AutoTokenizer.from_pretrained(directory), PAIRS[options.prompt])
    llm = ft.LLM(directory, weights=options.weights, speculation=None, max_sequences=options.batch, context=2048)
    params = ft.SamplingParams(max_tokens=options.test_tokens, temperature=0.0)
    with bar() as progress, record.open("a") as file:
        task = progress.add_task(record.stem, total=len(tests), completed=len(done))
        for start in range(len(done), len(tests), options.batch):
            part = tests[start : start + options.batch]
            answers = llm.generate([prompts(question)[which] for question, _ in part], params)
            for (_, gold), answer in zip(part, answers, strict=True):
                number = final_number(answer.text)
                row = {
                    "tokens": len(answer.token_ids),
                    "right": number is not None and abs(number - gold) < 1e-6,
                    "answered": number is not None,
                    "cut": answer.finish_reason == "length",
                }
                done.append(row)
                file.write(json.dumps(row) + "\n")
            file.flush()
            progress.advance(task, len(part))
    return done


def train(options: argparse.Namespace, training: list[tuple[str, float]]) -> Path:
    """Trains, or goes on; returns the directory of the trained checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained, state = options.out / "trained", options.out / "state.pt"
    if (trained / "model.safetensors").exists():
        return trained
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    rollouts = EngineRollouts(
        tokenizer,
        every=options.fresh,
        max_new_tokens=options.max_tokens,
        weights=options.weights,
        max_sequences=options.batch,
        context=2048,
    )
    trainer = Opsdc(
        model,
        chat_pairs(tokenizer, PAIRS[options.prompt]),
        rollouts,
        schedule=Schedule(options.refresh),
        lr=options.lr,
        filter=options.filter,
        micro_batch=options.micro_batch,
        autocast=torch.bfloat16,
        seed=options.seed,
    )
    if state.exists():
        trainer.load_state_dict(torch.load(state))
    order = list(range(len(training)))
    random.Random(options.seed).shuffle(order)
    with bar() as progress, (options.out / "steps.jsonl").open("a") as log:
        task = progress.add_task("training", total=options.steps, completed=trainer.steps)
        while trainer.steps < options.steps:
            first = trainer.steps * options.batch
            report = trainer.step([training[order[(first + i) % len(order)]][0] for i in range(options.batch)])
            log.write(json.dumps(vars(report)) + "\n")
            log.flush()
            seconds = f"{report.rollout_seconds:.0f} + {report.train_seconds:.0f} s"
            words = f"KL {report.loss:.4f}, {report.tokens:.0f} tokens, {seconds}"
            progress.update(task, completed=trainer.steps, description=words)
            if trainer.steps % options.save == 0 and trainer.steps < options.steps:
                torch.save(trainer.state_dict(), state.with_suffix(".new"))
                state.with_suffix(".new").replace(state)
    trained.mkdir(exist_ok=True)
    save_checkpoint(model, tokenizer, trained, torch.bfloat16)
    state.unlink(missing_ok=True)
    return trained


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval."""
    draws = random.Random(0)
    means = sorted(fmean(draws.choices(differences, k=len(differences))) for _ in range(2000))
    return fmean(differences), means[50], means[1949]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FARTHING_DATA", ".")) / "eval")
    parser.add_argument("--out", type=Path, default=Path("opsdc-run"))
    parser.add_argument("--prompt", choices=sorted(PAIRS), default="difficulty")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer while training")
    parser.add_argument("--refresh", type=int, default=50, help="steps between two teachers")
    parser.add_argument("--fresh", type=int, default=2, help="steps between two copies for the engine")
    parser.add_argument("--lr", type=float, default=5e-6)
    parser.add_argument("--filter", type=float, default=1e-4)
    parser.add_argument("--weights", default="int8", help="of the engine")
    parser.add_argument("--save", type=int, default=10, help="steps between two savings")
    parser.add_argument("--tests", type=int, default=400)
    parser.add_argument("--test-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tests = questions(options.data / "gsm8k_test.jsonl")[: options.tests]
    trained = train(options, questions(options.data / "gsm8k_train.jsonl"))
    conditions = {
        "as it was": (options.model, 0),
        "concise prompt alone": (options.model, 1),
        "trained": (trained, 0),
        "trained, concise prompt": (trained, 1),
    }
    rows = {
        name: evaluate(path, which, tests, options, options.out / f"{name.replace(', ', ' ').replace(' ', '-')}.jsonl")
        for name, (path, which) in conditions.items()
    }
    base, report = rows["as it was"], {}
    for name, found in rows.items():
        difference = interval([float(a["right"]) - float(b["right"]) for a, b in zip(found, base, strict=True)])
        report[name] = {
            "accuracy": fmean(row["right"] for row in found),
            "unanswered": fmean(not row["answered"] for row in found),
            "tokens": fmean(row["tokens"] for row in found),
            "fewer": 1 - sum(row["tokens"] for row in found) / sum(row["tokens"] for row in base),
            "difference": difference,
        }
        row = report[name]
        mean, low, high = (100 * x for x in difference)
        print(
            f"{name:24} {row['accuracy']:6.1%} right  {row['tokens']:6.1f} tokens ({-row['fewer']:+.1%})  "
            f"difference {mean:+.1f} points [{low:+.1f}, {high:+.1f}]"
        )
    (options.out / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
