"""What modules with packed weights have in common: they hold them, show them to operators, and save them."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import torch
from torch import nn

from .ops import number_of

__all__ = ["Packed"]

# In a state dict, beside the arrays: what else the weights are made of, as JSON in bytes.
_WORDS = "words"


class Packed(nn.Module):
    """A module whose weights are packed, and so neither parameters nor buffers.

    Attributes:
        packed: the weights; None before `load_state_dict` where there were none to begin with.
    """

    # Names of the arrays in a state dict.
    _arrays: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.packed: Any = None
        self._number = 0

    def _hold(self, packed: Any) -> None:
        self.packed = packed
        self._number = number_of(packed)

    def _held(self) -> Any:
        """The packed weights."""
        if self.packed is None:
            raise self._empty()
        return self.packed

    def _operand(self) -> int:
        """The number by which operators find the packed weights, which are nothing that could be traced."""
        if self._number == 0:
            raise self._empty()
        return self._number

    def _empty(self) -> RuntimeError:
        return RuntimeError(f"{type(self).__name__}: got no weights yet, expected load_state_dict first")

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the weights are made of: words that JSON can hold, and numpy arrays with names of `_arrays`."""
        raise NotImplementedError

    def _restored(self, words: dict[str, Any], arrays: dict[str, Any]) -> Any:
        """Packed weights of what `_state` told, if they fit here."""
        raise NotImplementedError

    def _converted(self, state_dict: dict[str, Any], prefix: str) -> Any:  # noqa: ARG002 - for those who can
        """Packed weights of a state dict of another module, if there are any; their tensors are taken out of it."""
        return None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is None:
            return
        words, arrays = self._state()
        destination[prefix + _WORDS] = torch.frombuffer(bytearray(json.dumps(words).encode()), dtype=torch.uint8)
        for name, array in arrays.items():
            destination[prefix + name] = torch.from_numpy(array)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        arrays = {name: state_dict.pop(prefix + name) for name in self._arrays if prefix + name in state_dict}
        words = state_dict.pop(prefix + _WORDS, None)
        try:
            other = self._converted(state_dict, prefix)
            if words is not None:
                numbers = {name: array.numpy() for name, array in arrays.items()}
                self._hold(self._restored(json.loads(bytes(words.tolist())), numbers))
            elif other is not None:
                self._hold(other)
            else:
                missing_keys.append(prefix + _WORDS)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.packed is not None:
            self._number = number_of(self.packed)
