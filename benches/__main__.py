"""``python -m benches``: what `make bench` measures; each part also runs alone with options of its own."""

from __future__ import annotations

import subprocess
import sys

# mistral.rs is left out of the whole-model table, since it computes this file's format without vectors.
PARTS = [
    ["benches.matmul_peers", "--seconds", "1"],
    ["benches.matmul_peers", "--seconds", "1", "--format", "ternary"],
    ["benches.end_to_end", "--engines", "farthing", "farthing a8", "llama.cpp", "transformers bf16", "OpenVINO GenAI"],
    ["benches.slices", "--rounds", "2", "--prompts", "16", "512"],
    ["benches.batching"],
    ["benches.router"],
    ["benches.moe_layer", "--seconds", "1"],
    ["benches.transformers_generate"],
    ["benches.accuracy"],
]

if __name__ == "__main__":
    failed = []
    for part in PARTS:
        print(f"\n== {' '.join(part)}", flush=True)
        if subprocess.run([sys.executable, "-m", *part], check=False).returncode != 0:
            failed.append(part[0])
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
