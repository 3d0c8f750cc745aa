"""What farthing raises; each message says what was got and what would have worked."""

from __future__ import annotations

__all__ = ["FarthingError", "FormatError", "ModelNotFoundError", "UnsupportedError"]


class FarthingError(Exception):
    """Anything that went wrong inside farthing."""


class FormatError(FarthingError, ValueError):
    """A model file or directory is damaged or is not what it says it is."""


class UnsupportedError(FarthingError):
    """The request is understood and can't be honoured; the message says what would work."""


class ModelNotFoundError(FarthingError, FileNotFoundError):
    """No file, directory, alias or Hub repository of that name can be reached."""
