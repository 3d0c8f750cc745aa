"""``python -m benches``: what `make bench` measures; each part also runs alone with options of its own."""

from __future__ import annotations

import subprocess
import sys

PARTS = ["benches.llama_cpp", "benches.batching", "benches.accuracy"]

if __name__ == "__main__":
    failed = []
    for part in PARTS:
        print(f"\n== {part}", flush=True)
        if subprocess.run([sys.executable, "-m", part], check=False).returncode != 0:
            failed.append(part)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
