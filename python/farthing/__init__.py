"""Cheaper answers from language models on the CPUs people already have.

```python
import farthing as ft

llm = ft.LLM("smollm2-135m")
(answer,) = llm.chat([{"role": "user", "content": "What is the capital of France?"}])
print(answer.text)
print(answer.ledger)
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import hf, llama_cpp, moe, nn, reasoning, speculative, vllm
    from ._core import __version__
    from .completion import Completion, Stream, TokenLogprobs
    from .errors import FarthingError, FormatError, ModelNotFoundError, UnsupportedError
    from .ledger import EngineLedger, Ledger
    from .llm import LLM
    from .matrix import PackedMatrix, quantize
    from .sampling import SamplingParams
    from .tokenizer import Tokenizer
    from .versions import show_versions

__all__ = [
    "LLM",
    "Completion",
    "EngineLedger",
    "FarthingError",
    "FormatError",
    "Ledger",
    "ModelNotFoundError",
    "PackedMatrix",
    "SamplingParams",
    "Stream",
    "TokenLogprobs",
    "Tokenizer",
    "UnsupportedError",
    "__version__",
    "hf",
    "llama_cpp",
    "moe",
    "nn",
    "quantize",
    "reasoning",
    "show_versions",
    "speculative",
    "vllm",
]

# Nothing is imported before it is used: `import farthing` costs next to nothing.
_HOMES = {
    "LLM": "llm",
    "Completion": "completion",
    "EngineLedger": "ledger",
    "FarthingError": "errors",
    "FormatError": "errors",
    "Ledger": "ledger",
    "ModelNotFoundError": "errors",
    "PackedMatrix": "matrix",
    "SamplingParams": "sampling",
    "Stream": "completion",
    "TokenLogprobs": "completion",
    "Tokenizer": "tokenizer",
    "UnsupportedError": "errors",
    "__version__": "_core",
    "quantize": "matrix",
    "show_versions": "versions",
}
# Rooms of their own; `hf` and `nn` import torch.
_PACKAGES = ("hf", "llama_cpp", "moe", "nn", "reasoning", "speculative", "vllm")


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
