"""Text to token ids and back: the tokenizer of a checkpoint folder, and streaming."""

from collections.abc import Callable
from filecmp import cmp
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from system.errors import InputError, blame_prompt
from system.files import is_file, require_files
from text.fast_tokenizer import FILE, MERGES, VOCABULARY, FastTokenizer, is_plain
from text.tokenizer_files import ADDED, FILES, SPECIAL, SPIECE, TokenizerFiles

if TYPE_CHECKING:
    from text.confined import Confined

#: What a decoder writes for bytes that are not (yet) a whole character.
_BROKEN = "\ufffd"


class Tokenizer:
    """A checkpoint's tokenizer.

    Where the folder has a ``tokenizer.json`` the tokenizers library reads it, in
    milliseconds. Others, files of unknown parts, and chat templates, are programs that
    somebody else wrote: they run confined (:mod:`confined`), which takes longer.
    """

    def __init__(self, folder: Path):
        """
        Raises:
            InputError: there is none, it is damaged, or gives an id to two tokens.
        """
        require_files(folder)
        self._folder = folder
        self._within = _open(folder)
        self.ids: dict[str, int] = self._within.ids()
        if not self.ids:
            raise InputError(f"{folder} has a tokenizer without tokens")
        if len(set(self.ids.values())) < len(self.ids) or min(self.ids.values()) < 0:
            raise InputError(f"{folder} has a tokenizer that gives an id to two tokens")

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens its model expects.

        Raises:
            PromptError: the tokenizer fails at it.
        """
        with blame_prompt():
            return self._within.encode(text)

    def encode_word(self, text: str) -> list[int]:
        """Token ids of a text inside another: without what goes around a prompt.

        Raises:
            PromptError: the tokenizer fails at it.
        """
        before, after = self._around
        tokens = self.encode(text)
        return tokens[before : len(tokens) - after]

    @cached_property
    def _around(self) -> tuple[int, int]:
        """How many special tokens go before a prompt, and after it."""
        around, probe = self.encode(""), self.encode("a")
        for before in range(len(around), -1, -1):
            after = len(around) - before
            if around == probe[:before] + probe[len(probe) - after :]:
                return before, after
        return 0, 0

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, in the form that the model was trained on.

        Args:
            messages: "role" and "content" each; the next one is to be the assistant's.

        Raises:
            InputError: the tokenizer has no chat template.
            PromptError: it has, but not for these.
        """
        program = self._with_template
        with blame_prompt():
            return program.call("encode_chat", messages)

    def require_chat(self) -> None:
        """
        Raises:
            InputError: the tokenizer has no chat template.
        """
        _ = self._with_template

    @cached_property
    def _with_template(self) -> "Confined":
        from text.confined import Confined

        program = Confined("text.slow_tokenizer", self._folder)
        if not program.call("has_chat_template"):
            raise InputError(f"{self._folder} has no chat template: leave out --chat")
        return program

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens left out, spaces as they were learned."""
        return self._within.decode(tokens, True)

    def decode_with_special(self, tokens: list[int]) -> str:
        """Likewise, with special tokens by their names: ``<extra_id_0>``, say."""
        return self._within.decode(tokens, False)

    @property
    def size(self) -> int:
        """One more than the largest id that stands for a token."""
        return 1 + max(self.ids.values())

    @property
    def end(self) -> int | None:
        """The id of what its files call the end of a text; None where they do not."""
        return self.ids.get(TokenizerFiles.read(self._folder).roles.get("eos_token"))

    def gaps(self, size: int) -> list[int]:
        """The ids below ``size`` that stand for no token."""
        taken = np.zeros(size, bool)
        ids = np.fromiter(self.ids.values(), np.int64, len(self.ids))
        taken[ids[ids < size]] = True
        return np.flatnonzero(~taken).tolist()

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether both give every id to the same token."""
        return self.ids == other.ids

    def difference(self, other: "Tokenizer") -> str:
        """The first id that is another token there, in words; empty without any."""
        if self.same_ids(other):
            return ""
        ours, theirs = _by_id(self.ids), _by_id(other.ids)
        first = min(
            token
            for token in ours.keys() | theirs.keys()
            if ours.get(token) != theirs.get(token)
        )
        mine, its = (_name(tokens.get(first)) for tokens in (ours, theirs))
        return f"token {first} is {its} in one and {mine} in the other"


def have_equal_files(one: Path, other: Path) -> bool:
    """Whether the tokenizers of two folders are the same for being the same files."""
    if not is_file(one / FILE):
        return False  # what others are may be for transformers to say
    for name in (*FILES, SPECIAL, ADDED):
        here, there = is_file(one / name), is_file(other / name)
        if here != there:
            return False
        if here and not cmp(one / name, other / name, shallow=False):
            return False
    return True


def _by_id(ids: dict[str, int]) -> dict[int, str]:
    return {number: token for token, number in ids.items()}


def _name(token: str | None) -> str:
    if token is None:
        return "none"
    return repr(token if len(token) <= 40 else f"{token[:40]}...")


class _Within(Protocol):
    """What reads the files: :class:`FastTokenizer`, or one in another process."""

    def ids(self) -> dict[str, int]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int], skip_special: bool) -> str: ...


class _Elsewhere:
    """A tokenizer in a confined process."""

    def __init__(self, module: str, folder: Path):
        from text.confined import Confined

        self._process = Confined(module, folder)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *arguments: self._process.call(method, *arguments)


def _open(folder: Path) -> _Within:
    if is_file(folder / FILE) and is_plain(folder):
        return FastTokenizer(folder)
    return _Elsewhere(reader_of(folder), folder)


def reader_of(folder: Path) -> str:
    """The module that reads a folder's tokenizer, in a confined process.

    ``tokenizer.json`` before ``spiece.model``, as transformers has it; transformers
    itself reads what neither these nor CodeT5's files are: ByT5's, say.
    """
    if is_file(folder / FILE) or _is_roberta(folder):
        return "text.fast_tokenizer"
    if is_file(folder / SPIECE):
        return "text.spiece_tokenizer"
    return "text.slow_tokenizer"


def _is_roberta(folder: Path) -> bool:
    files = is_file(folder / VOCABULARY) and is_file(folder / MERGES)
    return files and TokenizerFiles.read(folder).kind == "RobertaTokenizer"


class TextStream:
    """Turns tokens into text as they arrive.

    The pieces, joined, are the decoded whole (where bytes form no character, the count
    of U+FFFD may differ). A piece never ends inside a character: bytes of an unfinished
    one wait for the rest, and :meth:`finish` gives up what is left. Only the last few
    tokens are decoded again for each new one: a token's spaces depend on its neighbour,
    so a window starts at the last token already written.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._window: list[int] = []
        self._written = 0  # tokens at the window's start that are out already,
        self._before = ""  # and their text

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is unfinished."""
        self._window.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """The text still held back, with U+FFFD where bytes are missing."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        text = self._decode(self._window)
        new = text[len(self._before) :]
        if not new or (text.endswith(_BROKEN) and not final):
            return ""
        # A window does not begin with spaces alone: a decoder drops those.
        rest = self._window[self._written :]
        self._before = self._decode(rest)
        if self._before.strip():
            self._window = rest
        else:
            self._before = text
        self._written = len(self._window)
        return new
