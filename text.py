"""Text to token ids and back: the tokenizer of a checkpoint folder, and streaming."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from errors import InputError

FAST_TOKENIZER = "tokenizer.json"

#: What a decoder writes for bytes that are not (yet) a whole character.
_BROKEN = "\ufffd"


class Tokenizer:
    """A checkpoint's tokenizer.

    Where the folder has a ``tokenizer.json`` (``convert.py`` writes one wherever the
    tokenizer has that form) the tokenizers library reads it, in milliseconds; importing
    transformers takes seconds. The others are loaded through transformers.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._encode, self._decode, self.ids = _load(folder)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens its model expects."""
        return self._encode(text)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, in the form that the model was trained on.

        Args:
            messages: "role" (user or assistant) and "content" each; the next one is to
                be the assistant's.

        Raises:
            InputError: the tokenizer has no chat template, or not for these.
        """
        chat = self._with_template
        if chat.chat_template is None:
            raise InputError(f"{self._folder} has no chat template: leave out --chat")
        try:
            return chat.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # templates are programs
            raise InputError(f"the chat template fails: {error}") from None

    @cached_property
    def _with_template(self) -> Any:
        return load_with_transformers(self._folder)

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens left out, spaces as they were learned."""
        return self._decode(tokens, True)

    def decode_with_special(self, tokens: list[int]) -> str:
        """Likewise, with special tokens by their names: ``<extra_id_0>``, say."""
        return self._decode(tokens, False)

    @property
    def size(self) -> int:
        """One more than the largest id that stands for a token."""
        return 1 + max(self.ids.values())

    def gaps(self, size: int) -> list[int]:
        """The ids below ``size`` that stand for no token."""
        return sorted(set(range(size)).difference(self.ids.values()))

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether both give every id to the same token."""
        return self.ids == other.ids


def _load(
    folder: Path,
) -> tuple[
    Callable[[str], list[int]], Callable[[list[int], bool], str], dict[str, int]
]:
    """The encoder, the decoder and the ids by token of the folder's tokenizer.

    The decoder is told whether to leave special tokens out.
    """
    if (folder / FAST_TOKENIZER).is_file():
        from tokenizers import Tokenizer as FastTokenizer

        try:
            fast = FastTokenizer.from_file(str(folder / FAST_TOKENIZER))
        except Exception as error:  # the library raises plain Exception
            raise InputError(
                f"cannot read {folder / FAST_TOKENIZER}: {error}"
            ) from None
        # Settings for training batches that some checkpoints carry.
        fast.no_truncation()
        fast.no_padding()
        return (
            lambda text: fast.encode(text).ids,
            lambda tokens, skip: fast.decode(tokens, skip_special_tokens=skip),
            fast.get_vocab(with_added_tokens=True),
        )
    slow = load_with_transformers(folder)
    return (
        lambda text: slow(text).input_ids,
        lambda tokens, skip: slow.decode(
            tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        ),
        slow.get_vocab(),
    )


def load_with_transformers(folder: Path) -> Any:
    """The folder's tokenizer as transformers has it."""
    from transformers import AutoTokenizer, T5Tokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    # transformers 5 takes umT5's from a tokenizer.json alone.
    classes = [AutoTokenizer]
    if (folder / "spiece.model").is_file() and not (folder / FAST_TOKENIZER).is_file():
        classes.append(T5Tokenizer)
    for each in classes:
        try:
            tokenizer = each.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # damaged files make it raise anything
            if each is classes[-1]:
                raise InputError(
                    f"{folder} has no tokenizer that loads: {error}"
                ) from None
        else:
            break
    # Without its files transformers makes up an empty one; ByT5's has none to miss.
    files = tokenizer.vocab_files_names.values()
    if files and not any((folder / file).is_file() for file in files):
        raise InputError(f"{folder} has no tokenizer: none of {', '.join(files)}")
    return tokenizer


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
        self._written = 0  # tokens at the window's start that are out already

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is unfinished."""
        self._window.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """The text still held back, with U+FFFD where bytes are missing."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._decode(self._window[: self._written])
        text = self._decode(self._window)
        if len(text) <= len(before) or (text.endswith(_BROKEN) and not final):
            return ""
        self._window = self._window[self._written :]
        self._written = len(self._window)
        return text[len(before) :]
