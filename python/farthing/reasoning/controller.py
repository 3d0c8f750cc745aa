"""Following one sequence through its thinking, for hosts other than farthing's own engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import UnsupportedError
from ..sampling import integer
from ..tokenizer import Tokenizer
from .policy import Policy

__all__ = ["Controller", "ThinkSpec"]


class ThinkSpec:
    """How a model marks its thinking, in tokens. `from_tokenizer` makes one; the constructor takes ids.

    Args:
        starts: markers that open a span, each a list of token ids.
        ends: markers that end it.
        forced_close: what is written to end it by force; holds an end marker, what comes before that is thinking.
        boundary: tokens that end a sentence, for grace and ramp.
        incomplete_utf8: tokens that end inside a character; no grace ends there.
        tool_open, tool_close: markers of tool calls; no grace ends inside one.
        eos: tokens that end an answer: inside thinking they end the thinking.
        at_once: the first generated token is thinking already.

    Raises:
        ValueError: no end marker, an empty or a 17th one, or a ``forced_close`` that holds none.

    Example:
        >>> spec = ThinkSpec(starts=[[1]], ends=[[2]], forced_close=[7, 2])
        >>> controller = Controller(spec, Policy(budget=1, grace=0, ramp=None), [1], max_tokens=300)
        >>> controller.push(5)
        >>> controller.state, controller.forced
        ('forcing', 7)
    """

    def __init__(
        self,
        *,
        starts: Sequence[Sequence[int]],
        ends: Sequence[Sequence[int]],
        forced_close: Sequence[int],
        boundary: Sequence[int] = (),
        incomplete_utf8: Sequence[int] = (),
        tool_open: Sequence[Sequence[int]] = (),
        tool_close: Sequence[Sequence[int]] = (),
        eos: Sequence[int] = (),
        at_once: bool = False,
    ) -> None:
        self._core = _core.ThinkSpec.of_ids(
            _core.Lexicon.unspelled(_ids("boundary", boundary), _ids("incomplete_utf8", incomplete_utf8)),
            _markers("starts", starts),
            _markers("ends", ends),
            _ids("forced_close", forced_close),
            _markers("tool_open", tool_open),
            _markers("tool_close", tool_close),
            _ids("eos", eos),
            at_once,
        )

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Any,
        start: str | None = None,
        end: str | None = None,
        message: str | None = None,
        *,
        eos: Sequence[int] | None = None,
    ) -> ThinkSpec:
        """The markers of a tokenizer's model.

        A marker that is one token is recognised by its id, any other by the text that tokens spell, wherever they cut
        it; ``message`` and end marker are cut into tokens once.

        Args:
            tokenizer: farthing's, transformers', or any object with ``encode(text)`` and ``decode(ids)`` whose ``len``
                is the number of its tokens.
            start: text that opens a span; with ``end`` alone the first generated token does.
            end: text that ends it; None looks for the pairs that are known (``<think>``, ``[THINK]``, harmony, …).
            message: text written before the end marker by force; None is one plain sentence.
            eos: tokens that end an answer; None takes the tokenizer's.

        Raises:
            UnsupportedError: no known pair is in the vocabulary or the chat template, and none is given.
            ValueError: a marker is empty or longer than 64 bytes, or the tokenizer can't write it.
        """
        lexicon, encode, template, ends = _vocabulary(tokenizer)
        given = ends if eos is None else _ids("eos", eos)
        core = _core.ThinkSpec.of_text(lexicon, encode, start, end, message, given, template)
        if core is None:
            raise UnsupportedError(
                f"thinking markers in {type(tokenizer).__name__} are not supported; "
                "name the model's own: start='<think>', end='</think>', say"
            )
        spec = cls.__new__(cls)
        spec._core = core
        return spec

    @property
    def forced_close(self) -> list[int]:
        """What is written to end thinking by force."""
        return self._core.forced_close

    @property
    def eos(self) -> list[int]:
        """Tokens that end an answer."""
        return self._core.eos


class Controller:
    """Follows one sequence: what may come next, what must, and what each token was. A token costs below a microsecond.

    Args:
        spec: how the model marks its thinking.
        policy: how much of it is wanted; None follows only.
        prompt_ids: the prompt, which may have opened a span.
        max_tokens: most tokens that will be generated; the answer's reserve is kept of them.

    Raises:
        ValueError: banned tokens of which an end marker is made, or an id or count out of range.
    """

    __slots__ = ("_core",)

    def __init__(self, spec: ThinkSpec, policy: Policy | None, prompt_ids: Sequence[int], max_tokens: int) -> None:
        core = None if policy is None else policy._core
        most = integer("max_tokens", max_tokens, 0)
        self._core = _core.Controller(spec._core, core, _ids("prompt_ids", prompt_ids), most)

    def push(self, token: int) -> None:
        """Takes in a token that the sequence goes on with."""
        self._core.push(token)

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes in several."""
        self._core.extend(_ids("tokens", tokens))

    def process(self, logits: npt.NDArray[np.float32]) -> None:
        """Applies what is known of the next token to ``logits``, float32 (V,), in place.

        A dictated token stands alone at 0, all others at -inf. Else banned tokens go to -inf, inside thinking the end
        of the answer gives its logit to the end marker, and the ramp raises that.
        """
        self._core.process(logits)

    def peek(self, drafts: Sequence[int]) -> int:
        """The index of the first of ``drafts`` that may not stand, their number when all may; nothing is taken in."""
        return self._core.peek(_ids("drafts", drafts))

    def permits(self, token: int) -> bool:
        """Whether ``token`` may come next."""
        return self._core.permits(token)

    def close(self) -> None:
        """Ends thinking from the next token on, as ``early_exit``; does nothing outside of it."""
        self._core.close()

    def copy(self) -> Controller:
        """An independent controller in the same state."""
        other = Controller.__new__(Controller)
        other._core = self._core.copy()
        return other

    @property
    def state(self) -> str:
        """``idle``, ``think``, ``soft``, ``grace``, ``forcing`` or ``answer``."""
        return self._core.state

    @property
    def stop(self) -> str | None:
        """Why thinking ended, or None.

        One of ``natural``, ``budget``, ``grace``, ``early_exit``, ``loop``, ``eos_fix`` and ``length``.
        """
        return self._core.stop

    @property
    def forced(self) -> int | None:
        """The token that must come next, or None."""
        return self._core.forced

    @property
    def dictated(self) -> list[int]:
        """All tokens that are known to come next."""
        return self._core.dictated

    @property
    def is_thinking(self) -> bool:
        """Whether the next token is thinking, unless it ends it."""
        return self._core.is_thinking

    @property
    def thinking_tokens(self) -> int:
        """Tokens pushed inside a span, dictated ones and markers left out."""
        return self._core.thinking_tokens

    @property
    def forced_tokens(self) -> int:
        """Tokens pushed that were dictated."""
        return self._core.forced_tokens

    @property
    def answer_tokens(self) -> int:
        """All other tokens pushed."""
        return self._core.answer_tokens


def _ids(name: str, ids: Any) -> list[int]:
    return [integer(name, token, 0, 2**32 - 1) for token in ids]


def _markers(name: str, markers: Any) -> list[list[int]]:
    return [_ids(name, marker) for marker in markers]


_Encode = Callable[[str], list[int]]


def _vocabulary(tokenizer: Any) -> tuple[_core.Lexicon, _Encode, str | None, list[int]]:
    """Spellings, how to encode, the chat template's source, and the end tokens."""
    if isinstance(tokenizer, Tokenizer):
        core = tokenizer._core
        return core.lexicon(), lambda text: core.encode(text, False), None, core.end_tokens()
    template = getattr(tokenizer, "chat_template", None)
    end = getattr(tokenizer, "eos_token_id", None)
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    encode = _encoder(tokenizer)
    lexicon = _LEXICONS.get(id(tokenizer))
    if lexicon is None or lexicon[0] is not tokenizer:
        # A few at a time: processes have one tokenizer, tests have many.
        while len(_LEXICONS) >= 4:
            _LEXICONS.pop(next(iter(_LEXICONS)))
        lexicon = tokenizer, _core.Lexicon(_spellings(tokenizer, encode))
        _LEXICONS[id(tokenizer)] = lexicon
    return lexicon[1], encode, template if isinstance(template, str) else None, ends


_LEXICONS: dict[int, tuple[Any, _core.Lexicon]] = {}


def _encoder(tokenizer: Any) -> _Encode:
    def encode(text: str) -> list[int]:
        if not text:
            return []
        try:
            ids = tokenizer.encode(text, add_special_tokens=False)
        except TypeError:
            ids = tokenizer.encode(text)
        return list(getattr(ids, "ids", ids))

    return encode


def _spellings(tokenizer: Any, encode: _Encode) -> list[bytes]:
    """The bytes of every token: what it adds behind another one, so that no blank at a text's start is lost."""
    count = len(tokenizer)
    anchor = encode("a")

    def decode(ids: list[int]) -> str:
        try:
            return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        except TypeError:
            return str(tokenizer.decode(ids))

    before = decode(anchor)
    names = getattr(tokenizer, "convert_ids_to_tokens", None)
    tokens = names(list(range(count))) if names else [None] * count
    return [_bytes(decode([*anchor, token]).removeprefix(before), name) for token, name in enumerate(tokens)]


def _bytes(text: str, name: str | None) -> bytes:
    """The bytes of a token that decodes to ``text``; parts of characters are only in its ``name``."""
    if "\ufffd" not in text or name is None:
        return text.encode()
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(byte[1])
    letters = _letters()
    if all(letter in letters for letter in name):
        return bytes(letters[letter] for letter in name)
    return text.encode()


@cache
def _letters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
