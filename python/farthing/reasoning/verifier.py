"""The grader's own process: math-verify on JSON lines.

math-verify interrupts itself by ``signal.alarm``, which works in a main thread only, and some expressions hang it all
the same; so it runs where it can be killed. A request is ``{"gold": text, "texts": [text, ...]}``; the reply says
whether any text holds the gold answer, whether anything could be read from one, and what went wrong.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

# Most address space, so that a power tower ends this process and not the machine.
MEMORY = 4 << 30


def check(gold: str, texts: list[str]) -> dict[str, Any]:
    """Whether any of ``texts`` verifies against ``gold`` (LaTeX without its dollars)."""
    from math_verify import (  # type: ignore[import-untyped]
        ExprExtractionConfig,
        LatexExtractionConfig,
        parse,
        verify,
    )

    expected = parse(f"\\boxed{{{gold}}}", [LatexExtractionConfig()], raise_on_error=True)
    right, read = False, False
    error: str | None = None if expected else "the reference answer can't be read"
    for text in texts:
        try:
            found = parse(text, [ExprExtractionConfig(), LatexExtractionConfig()], raise_on_error=True)
            read = read or bool(found)
            right = right or bool(verify(expected, found, raise_on_error=True))
        except Exception as failure:  # noqa: BLE001 - a parser of anything may raise anything; it is told, not hidden
            error = f"{type(failure).__name__}: {failure}"
    return {"right": right, "read": read, "error": error}


def main() -> None:
    """Answers line by line until its input ends."""
    logging.disable(logging.CRITICAL)
    try:
        import resource
    except ImportError:  # no such limit on this system
        pass
    else:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # whatever a parser prints is no reply
        for line in sys.stdin:
            try:
                reply = check(**json.loads(line))
            except Exception as failure:  # noqa: BLE001 - likewise
                reply = {"right": False, "read": False, "error": f"{type(failure).__name__}: {failure}"}
            replies.write(json.dumps(reply) + "\n")
            replies.flush()


if __name__ == "__main__":
    main()
