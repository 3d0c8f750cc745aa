"""What the lossy levers on experts cost and save: KL, top-1 agreement and perplexity against bytes, over thresholds.

``python -m benches.moe_levers [--tokens 1024] [--share 0.5] [--minutes 1.5] [--cache DIRECTORY]``

The model is SmolLM2-135M made a mixture (`benches.moe_split`: a shared expert of a third of the neurons, and 32 of
which a token meets 8, trained for ``--minutes`` on WikiText-2's validation set; kept in ``--cache``), in int4. It is
far worse than the dense model, but its routers have learnt. The reference is the same packed mixture without levers,
the text WikiText-2's test set in windows of 256, token by token as in decoding. KL is from the reference, in nats, a
mean; top-1 the share of positions with the same likeliest token. Bytes are those of experts that tokens are sent to,
for one token: read from memory, and under ``expert_memory`` (a ``--share`` of all experts) fetched from disk. Beside
``expert_skip`` stands what the same mixture does with fewer experts for every token.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import farthing as ft  # noqa: E402
import reference  # noqa: E402

from .end_to_end import default_model  # noqa: E402
from .moe_split import CHOICES, WINDOW, make  # noqa: E402

DATA = Path(os.environ.get("FARTHING_DATA", ROOT.parent / "shared" / "data"))
SKIPS = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
MARGINS = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5]
HEADER = (
    f"{'':<28}{'perplexity':>11}{'KL':>10}{'top-1':>8}{'experts':>9}{'read':>10}{'saved':>7}"
    f"{'in memory':>11}{'fetched':>10}"
)


class Run:
    """A model's logits over windows of text, one token after the other, and what they cost."""

    def __init__(self, directory: Path, windows: list[list[int]], **options: Any) -> None:
        llm = ft.LLM(directory, weights="int4", threads=2, max_sequences=1, context=WINDOW, chunk=1, **options)
        self.matrices = [matrix for matrix in llm.explain() if matrix.role.startswith("expert")]
        self.logits = np.concatenate([llm.logits(window) for window in windows])
        self.ledger = llm.ledger
        # Every expert of this model is as large.
        self.expert_bytes = sum(m.nbytes / m.count for m in self.matrices) / (len(self.matrices) / 3)
        self.choices = sum(m.used for m in self.matrices) / 3
        self.read = (self.choices - self.ledger.expert_skipped / self.ledger.rows) * self.expert_bytes
        self.layers = len(self.matrices) // 3

    def row(self, name: str, base: Run, ids: list[int]) -> dict[str, Any]:
        """Prints one line of the table and returns it."""
        agreement = reference.Agreement(base.logits, self.logits, ids)
        ledger = self.ledger
        row = {
            "name": name,
            "perplexity": agreement.perplexity,
            "kl": agreement.kl,
            "top1": agreement.top1,
            "experts": self.read / self.expert_bytes / self.layers,
            "read": self.read,
            "saved": 1 - self.read / base.read,
            "hit_rate": ledger.expert_hit_rate,
            "fetched": ledger.expert_bytes / ledger.rows,
            "substituted": ledger.expert_substituted / ledger.expert_choices if ledger.expert_choices else 0.0,
        }
        memory = "" if row["hit_rate"] is None else f"{row['hit_rate']:.1%}"
        print(
            f"{name:<28}{row['perplexity']:>11.2f}{row['kl']:>10.4f}{row['top1']:>8.1%}{row['experts']:>9.2f}"
            f"{row['read'] / 1e6:>7.2f} MB{row['saved']:>7.0%}{memory:>11}{row['fetched'] / 1e6:>7.2f} MB",
            flush=True,
        )
        return row


def fewer(directory: Path, top_k: int) -> Path:
    """The mixture with another number of experts for every token."""
    to = directory.with_name(f"{directory.name}-top{top_k}")
    to.mkdir(exist_ok=True)
    if not (to / "model.safetensors").exists():
        (to / "model.safetensors").symlink_to((directory / "model.safetensors").resolve())
    config = json.loads((directory / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": top_k}))
    return to


def main() -> None:
    """Parses the command line and prints the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--share", type=float, default=0.5, help="of the experts that fit in memory under a margin")
    parser.add_argument("--minutes", type=float, default=1.5, help="of training")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "farthing-benches")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    texts = [DATA / "eval" / f"wikitext2_{part}.txt" for part in ("valid", "test")]
    if not all(text.exists() for text in texts):
        raise SystemExit(f"needs {texts[0]} and {texts[1].name} (or FARTHING_DATA)")
    tokenizer = ft.LLM(default_model(), max_sequences=1, context=64).tokenizer
    training, test = (tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False) for text in texts)
    directory = arguments.cache / f"smollm2-mixture-{arguments.minutes:g}"
    if not (directory / "config.json").exists():
        shutil.rmtree(directory, ignore_errors=True)
        make(directory, reference.gguf_model(default_model()), training, arguments.minutes)
    starts = np.linspace(0, len(test) - WINDOW, arguments.tokens // WINDOW).astype(int)
    windows = [test[start : start + WINDOW] for start in starts]
    ids = [token for window in windows for token in window]
    figures = curves(directory, windows, ids, arguments.share)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def curves(directory: Path, windows: list[list[int]], ids: list[int], share: float) -> list[dict[str, Any]]:
    """All lines of the table."""
    base = Run(directory, windows)
    print(f"\n{len(ids)} tokens of WikiText-2, SmolLM2-135M as a mixture, int4\n{HEADER}")
    figures = [base.row("no lever", base, ids)]
    figures += [Run(fewer(directory, k), windows).row(f"{k} experts for all", base, ids) for k in CHOICES[-2::-1]]
    for skip in SKIPS:
        figures.append(Run(directory, windows, expert_skip=skip).row(f"expert_skip={skip}", base, ids))
    budget = int(share * sum(matrix.nbytes for matrix in base.matrices))
    print(f"\nexpert_memory of {share:.0%} of the experts\n{HEADER}")
    figures.append(Run(directory, windows, expert_memory=budget).row("no lossy lever", base, ids))
    for margin in MARGINS:
        run = Run(directory, windows, expert_memory=budget, expert_cache_margin=margin)
        figures.append(run.row(f"expert_cache_margin={margin}", base, ids))
    return figures


if __name__ == "__main__":
    main()
