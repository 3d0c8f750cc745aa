"""One real run of on-policy self-distillation: GSM8K's training questions, then tokens and accuracy on its test set.

``python -m benches.opsdc --model DIRECTORY [--data DIRECTORY] [--out opsdc-run] [--steps 100] [--batch 16]``, or
``make opsdc MODEL=DIRECTORY``

The model is a checkpoint of transformers (floats) with a chat template; the data folder holds ``gsm8k_train.jsonl`` and
``gsm8k_test.jsonl``. Answers while training come from farthing's engine, from a copy of the weights that is renewed
every ``--fresh`` steps. The run can be stopped at any time and goes on where it was saved. Then the test questions are
answered greedily by the model as it was, by the same with the concise prompt alone, and by the trained one with either
prompt. Reports go to the folder ``--out``, a table with paired differences to the screen.
"""

import argparse
import json
import os
import random
from pathlib import Path

import farthing as ft
import torch
from farthing.reasoning import (
    DIFFICULTY_AWARE,
    UNIFORM,
    EngineRollouts,
    Opsdc,
    PromptPair,
    Report,
    Schedule,
    chat_pairs,
)
from farthing.reasoning.comparison import table
from farthing.reasoning.rollouts import save_checkpoint
from farthing.reasoning.tasks import CONCISE
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# What the teacher is asked. The first is the prompt that evaluation calls concise.
PAIRS = {
    "concise": PromptPair(UNIFORM.student, f"{CONCISE}\n\n{{question}}"),
    "difficulty": DIFFICULTY_AWARE,
    "uniform": UNIFORM,
}


def bar() -> Progress:
    """A bar with a line of figures."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def evaluate(directory: Path, concise: bool, name: str, options: argparse.Namespace) -> Report:
    """Answers to the test questions; those of a finished report are not given again."""
    record = options.out / f"{name.replace(', ', '-').replace(' ', '-')}.json"
    if record.exists():
        return Report.load(record)
    llm = ft.LLM(directory, weights=options.weights, speculation=None, max_sequences=options.batch, context=2048)
    params = ft.SamplingParams(max_tokens=options.test_tokens, temperature=0.0)
    with bar() as progress:
        task = progress.add_task(name, total=options.tests)
        report = ft.reasoning.evaluate(
            llm,
            options.data / "gsm8k_test.jsonl",
            params,
            limit=options.tests,
            concise=concise,
            name=name,
            progress=lambda _, done, __: progress.update(task, completed=done),
        )
    report.save(record)
    return report


def train(options: argparse.Namespace) -> Path:
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
    training = [item.problem for item in ft.reasoning.read_items(options.data / "gsm8k_train.jsonl")]
    order = list(range(len(training)))
    random.Random(options.seed).shuffle(order)
    with bar() as progress, (options.out / "steps.jsonl").open("a") as log:
        task = progress.add_task("training", total=options.steps, completed=trainer.steps)
        while trainer.steps < options.steps:
            first = trainer.steps * options.batch
            report = trainer.step([training[order[(first + i) % len(order)]] for i in range(options.batch)])
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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FARTHING_DATA", ".")) / "eval")
    parser.add_argument("--out", type=Path, default=Path("opsdc-run"))
    parser.add_argument("--prompt", choices=list(PAIRS), default="concise", help="what the teacher is asked")
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
    trained = train(options)
    reports = [
        evaluate(options.model, False, "as it was", options),
        evaluate(options.model, True, "concise prompt alone", options),
        evaluate(trained, False, "trained", options),
        evaluate(trained, True, "trained, concise prompt", options),
    ]
    print(table(reports, reports[0]))


if __name__ == "__main__":
    main()
