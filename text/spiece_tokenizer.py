"""A bare ``spiece.model``, through SentencePiece itself; for a confined process alone.

What a T5 was trained with is SentencePiece's own reading of that file: its
normalization, its byte fallback, its unknown id, of any kind of model. Around it stand
what T5's tokenizer in transformers 4 does: texts are split at added tokens, each piece
is encoded by itself, and an end of sequence follows.
"""

import re
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from system.errors import InputError
from system.files import open_file, require_files
from text.tokenizer_files import SPIECE, AddedToken, TokenizerFiles, copy_files

#: Appended to a model (a protocol buffer), sets its normalizer_spec.add_dummy_prefix to
#: false: what is there twice is merged.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SpieceTokenizer:
    """The folder's spiece.model with its added tokens."""

    def __init__(self, folder: Path):
        """
        Raises:
            InputError: the file is missing or damaged, or its settings are.
        """
        require_files(folder)
        self._folder = folder
        try:
            with open_file(folder / SPIECE) as file:
                raw = file.read()
            self._pieces = SentencePieceProcessor(model_proto=raw)
            self._bare = SentencePieceProcessor(model_proto=raw + _NO_DUMMY_PREFIX)
        except (OSError, RuntimeError) as error:
            raise InputError(f"cannot read {folder / SPIECE}: {error}") from None
        if self._pieces.get_piece_size() < 1:
            raise InputError(f"{folder / SPIECE} has no pieces")
        files = TokenizerFiles.read(folder, implied="T5Tokenizer", slow=True)
        self._legacy = files.legacy
        self._added = self._with_ids(files.added)
        self._contents = {token.id: token.content for token in self._added.values()}
        self._special = {t.id for t in self._added.values() if t.special}
        self._end = self._id(files.roles.get("eos_token", "</s>"))

    def _with_ids(self, added: list[AddedToken]) -> dict[str, AddedToken]:
        """Every added token with its id: the vocabulary's where it is a piece, T5's
        sentinels from the end down, what is left after all others."""
        size = self._pieces.get_piece_size()
        tokens: dict[str, AddedToken] = {}
        sentinels = [t for t in added if t.id is None and _number(t) is not None]
        last = size + len(sentinels) - 1
        free = max([last, *(t.id for t in added if t.id is not None)]) + 1
        for token in added:
            number = token.id
            if number is None:
                number = self._piece(token.content)
            if number is None and token in sentinels:
                number = last - _number(token)
            if number is None:
                number, free = free, free + 1
            tokens[token.content] = replace(token, id=number)
        return tokens

    def _piece(self, content: str) -> int | None:
        """The id of a piece of exactly this text; None if there is none."""
        number = self._pieces.piece_to_id(content)
        return number if self._pieces.id_to_piece(number) == content else None

    def _id(self, content: str) -> int | None:
        token = self._added.get(content)
        return token.id if token else self._piece(content)

    @cached_property
    def _split(self) -> re.Pattern[str] | None:
        """Finds added tokens, the longest first where several begin."""
        contents = sorted(self._added, key=len, reverse=True)
        found = "|".join(re.escape(each) for each in contents if each)
        return re.compile(f"({found})") if found else None

    def ids(self) -> dict[str, int]:
        """Every token's id; of pieces that share a text the first one's."""
        size = self._pieces.get_piece_size()
        pieces = {self._pieces.id_to_piece(i): i for i in reversed(range(size))}
        taken = set(self._contents)
        pieces = {text: i for text, i in pieces.items() if i not in taken}
        return pieces | {token.content: token.id for token in self._added.values()}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the end of sequence unless it ends with one."""
        ids: list[int] = []
        first = True
        for part in self._parts(text):
            if isinstance(part, AddedToken):
                ids.append(part.id)
            elif part:
                ids += self._encode(part, first or self._legacy)
            first = False
        if self._end is not None and (not ids or ids[-1] != self._end):
            ids.append(self._end)
        return ids

    def _encode(self, text: str, begins: bool) -> list[int]:
        """A piece of text; unless it ``begins`` one, or with a space, without the space
        that is put before the first word."""
        spaced = begins or text.startswith((" ", "\u2581"))
        return (self._pieces if spaced else self._bare).encode(text)

    def _parts(self, text: str) -> list[str | AddedToken]:
        """The text, split at its added tokens."""
        if self._split is None:
            return [text]
        parts: list[str | AddedToken] = []
        for place, part in enumerate(self._split.split(text)):
            parts.append(self._added[part] if place % 2 else part)
        for place, token in enumerate(parts):
            if isinstance(token, AddedToken):
                before, after = parts[place - 1], parts[place + 1]
                if token.single_word and (_is_word(before[-1:]) or _is_word(after[:1])):
                    parts[place] = token.content
                    continue
                parts[place - 1] = before.rstrip() if token.lstrip else before
                parts[place + 1] = after.lstrip() if token.rstrip else after
        return _joined(parts)

    def decode(self, tokens: list[int], skip_special: bool) -> str:
        """Text of token ids, with or without special tokens, spaces around those that
        are shown: as transformers 4's T5Tokenizer has it."""
        if skip_special:
            tokens = [token for token in tokens if token not in self._special]
        parts: list[str] = []
        for added, run in groupby(tokens, lambda token: token in self._contents):
            if added:
                parts += [self._contents[token] for token in run]
            else:
                known = range(self._pieces.get_piece_size())
                parts.append(self._pieces.decode([t for t in run if t in known]))
        return " ".join(part for part in parts if part)

    def save(self, folder: str) -> None:
        """Copy its files into ``folder``, as they are."""
        copy_files(self._folder, Path(folder), SPIECE)


def open_folder(folder: Path) -> SpieceTokenizer:
    """For :mod:`confined`."""
    return SpieceTokenizer(folder)


def _number(token: AddedToken) -> int | None:
    """Which of T5's sentinels it is."""
    match = re.fullmatch(r"<extra_id_(\d{1,5})>", token.content)
    return int(match[1]) if match else None


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _joined(parts: list[str | AddedToken]) -> list[str | AddedToken]:
    """Texts side by side become one again."""
    joined: list[str | AddedToken] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined
