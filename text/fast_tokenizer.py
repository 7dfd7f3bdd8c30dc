"""A ``tokenizer.json``, through the tokenizers library: in milliseconds, no more.

What it does to a text is composed in the file. Of known parts it takes time and memory
in proportion to the text; of others (regular expressions that backtrack, replacements
that grow) nobody knows, and :func:`is_plain` tells them apart.
"""

import base64
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Raw, Struct
from tokenizers import AddedToken as LibraryToken
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors

from system.errors import InputError
from system.files import is_file, open_file
from text.tokenizer_files import SPIECE, TokenizerFiles, copy_files

FILE = "tokenizer.json"
VOCABULARY, MERGES = "vocab.json", "merges.txt"

#: What RoBERTa's tokenizer puts after a text and before it.
_ROBERTA = ("sep_token", "</s>"), ("cls_token", "<s>")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")

#: Bytes of a tokenizer.json, Gemma's has 35 million; of each part but its tokens, the
#: largest is T5's table of characters with 0.4 million; of all tokens together, mT5's
#: are 2 million. And characters of one token.
FILE_BYTES = 50_000_000
_PART_BYTES = 1 << 22
_TOKENS_BYTES = 3_000_000
_TOKEN_LENGTH = 1 << 10

#: Regular expressions that are known to take linear time: T5's, and those of GPT-2,
#: Llama 3 and Qwen 2.
_WORDS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
REGEXES = (
    " {2,}",
    r"\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _WORDS % r"\p{N}{1,3}",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _WORDS % r"\p{N}",
)

#: Parts that need no look inside.
_NORMALIZERS = {
    *("BertNormalizer", "ByteLevel", "Lowercase", "Nmt", "Strip", "StripAccents"),
    *("NFC", "NFD", "NFKC", "NFKD"),
}
_PRE_TOKENIZERS = {
    *("BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace"),
    *("Punctuation", "UnicodeScripts", "Whitespace", "WhitespaceSplit"),
}
_DECODERS = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Strip", "WordPiece"}
_POST_PROCESSORS = {"BertProcessing", "ByteLevel", "RobertaProcessing"}
#: What a sequence has one of at most.
_ONCE = {"Precompiled", "TemplateProcessing"}
#: Parts that make one character several: eighteen at most, and ByteLevel two or more.
_GROWING = {"BertNormalizer", "ByteLevel", "NFD", "NFKC", "NFKD", "Precompiled"}
#: Parts of a sequence; tokens in a template, and ids of one of them.
_PARTS = 16
_TOKENS = 64
#: The longest replacement of a character by a normalizer's own table. NMT's longest
#: has 33 bytes: one character that stands for a blessing.
_REPLACEMENT = 64
#: Characters of a word that WordPiece looks at: it takes their square in time.
_WORD = 1000


class _Model(Struct):
    vocab: dict[str, int] | list[tuple[str, float]] = {}
    max_input_chars_per_word: int = 100


class _Added(Struct):
    content: str


class _File(Struct):
    """What is read of a tokenizer.json to judge it."""

    model: _Model
    added_tokens: list[_Added] | None = None
    normalizer: Raw = Raw(b"null")
    pre_tokenizer: Raw = Raw(b"null")
    post_processor: Raw = Raw(b"null")
    decoder: Raw = Raw(b"null")


def is_plain(folder: Path) -> bool:
    """Whether the folder's tokenizer.json consists of nothing but known parts.

    One that is too large to be judged is not, nor is one whose tokens are so long that
    the library would take a gigabyte to look them up.

    Raises:
        InputError: it is none.
    """
    path = folder / FILE
    try:
        with open_file(path) as file:
            text = file.read(FILE_BYTES + 1)
        if len(text) > FILE_BYTES:
            return False
        return _is_plain(msgspec.json.decode(text, type=_File))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def _is_plain(parts: _File) -> bool:
    return (
        _is_known(parts.normalizer, "normalizers", _is_plain_normalizer)
        and _is_known(parts.pre_tokenizer, "pretokenizers", _is_plain_pre_tokenizer)
        and _is_known(parts.post_processor, "processors", _is_plain_post_processor)
        and _is_known(parts.decoder, "decoders", _is_plain_decoder)
        and 0 <= parts.model.max_input_chars_per_word <= _WORD
        and _are_short(_tokens(parts.model.vocab))
        and _are_short([added.content for added in parts.added_tokens or ()])
        and _growing(parts) <= 2
    )


def _tokens(vocabulary: Any) -> list[str]:
    listed = isinstance(vocabulary, list)
    return [entry[0] for entry in vocabulary] if listed else list(vocabulary)


def _are_short(tokens: list[str]) -> bool:
    """Whether tokens are of sane length: the library has 350 bytes for each byte."""
    longest = max(map(len, tokens), default=0)
    whole = len("".join(tokens).encode("utf-8", "surrogatepass"))
    return longest <= _TOKEN_LENGTH and whole <= _TOKENS_BYTES


def _growing(parts: _File) -> int:
    """How many parts may make a text longer, each what the one before left."""
    found = 0
    for raw, inside in (
        (parts.normalizer, "normalizers"),
        (parts.pre_tokenizer, "pretokenizers"),
    ):
        part = msgspec.json.decode(raw) or {}
        each = part.get(inside, ()) if _kind(part) == "Sequence" else [part]
        found += sum(_kind(one) in _GROWING for one in each)
    return found


def _is_known(raw: Raw, inside: str, judge: Any) -> bool:
    """Whether a part, or every part of a sequence, is known."""
    if len(raw) > _PART_BYTES:
        return False
    part = msgspec.json.decode(raw)
    if part is None:
        return True
    if not isinstance(part, dict):
        return False
    if _kind(part) != "Sequence":
        return judge(part)
    parts = part.get(inside)
    return (
        isinstance(parts, list)
        and len(parts) <= _PARTS
        and all(isinstance(each, dict) and judge(each) for each in parts)
        and sum(_kind(each) in _ONCE for each in parts) <= 1
    )


def _kind(part: Any) -> str:
    """What a part says it is, if that is a word."""
    kind = part.get("type") if isinstance(part, dict) else None
    return kind if isinstance(kind, str) else ""


def _is_plain_normalizer(part: dict[str, Any]) -> bool:
    kind = _kind(part)
    if kind == "Precompiled":
        return _is_plain_table(part.get("precompiled_charsmap"))
    if kind == "Prepend":
        return isinstance(part.get("prepend"), str) and len(part["prepend"]) <= 8
    return kind in _NORMALIZERS or _is_plain_replacement(part)


def _is_plain_table(table: Any) -> bool:
    """Whether a table of replacements has none that is long.

    It is 4 bytes of size, a trie of that size, and the replacements, each ended by a 0.
    """
    try:
        raw = base64.b64decode(table, validate=True)
    except (TypeError, ValueError):
        return False
    trie = int.from_bytes(raw[:4], "little")
    if trie % 4 or 4 + trie > len(raw):
        return False  # the library makes room for what the table says, not for what is
    replacements = raw[4 + trie :]
    return max(map(len, replacements.split(b"\0"))) <= _REPLACEMENT


def _is_plain_pre_tokenizer(part: dict[str, Any]) -> bool:
    if _kind(part) == "Split":
        return _is_plain_pattern(part.get("pattern"))
    return _kind(part) in _PRE_TOKENIZERS


def _is_plain_post_processor(part: dict[str, Any]) -> bool:
    if _kind(part) != "TemplateProcessing":
        return _kind(part) in _POST_PROCESSORS
    tokens = part.get("special_tokens")
    if not isinstance(tokens, dict):
        return False
    for template in (part.get("single"), part.get("pair")):
        if not isinstance(template, list) or len(template) > _TOKENS:
            return False
        texts = [
            str(piece["Sequence"].get("id"))
            for piece in template
            if isinstance(piece, dict) and isinstance(piece.get("Sequence"), dict)
        ]
        if len(set(texts)) < len(texts):
            return False
    ids = [token.get("ids") for token in tokens.values() if isinstance(token, dict)]
    return all(isinstance(each, list) and len(each) <= _TOKENS for each in ids)


def _is_plain_decoder(part: dict[str, Any]) -> bool:
    if _kind(part) == "BPEDecoder":
        return bool(part.get("suffix"))  # an empty one is everywhere
    return _kind(part) in _DECODERS or _is_plain_replacement(part)


def _is_plain_replacement(part: dict[str, Any]) -> bool:
    """Whether it makes no text longer."""
    pattern, content = part.get("pattern"), part.get("content")
    return (
        _kind(part) == "Replace"
        and _is_plain_pattern(pattern)
        and isinstance(content, str)
        and len(content) <= max(1, len(pattern.get("String", "")))
    )


def _is_plain_pattern(pattern: Any) -> bool:
    if not isinstance(pattern, dict) or len(pattern) != 1:
        return False
    string = pattern.get("String")
    return pattern.get("Regex") in REGEXES or (isinstance(string, str) and string != "")


class FastTokenizer:
    """The folder's tokenizer.json; also the object that a confined process holds."""

    def __init__(self, folder: Path):
        """
        Raises:
            InputError: the file is damaged, or none that the library reads.
        """
        self._folder = folder
        self._path = folder / FILE
        if is_file(self._path):
            with open_file(self._path) as file:
                self._library = self._ask(Library.from_buffer, file.read())
        else:
            self._path = folder / VOCABULARY
            self._library = self._ask(_byte_level, folder)
        # Settings for training batches that some checkpoints carry.
        self._ask(self._library.no_truncation)
        self._ask(self._library.no_padding)

    def ids(self) -> dict[str, int]:
        """Every token's id."""
        return self._ask(self._library.get_vocab, with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the file says."""
        return self._ask(self._library.encode, text).ids

    def decode(self, tokens: list[int], skip_special: bool) -> str:
        """Text of token ids, with or without special tokens."""
        return self._ask(self._library.decode, tokens, skip_special_tokens=skip_special)

    def save(self, folder: str) -> None:
        """Write it into ``folder``: the file as it was found.

        Special tokens that only the files beside it name are added, as transformers 4
        does when it loads them.

        Raises:
            InputError: those files give a token another id than it would get.
        """
        found = self._ask(self._library.get_added_tokens_decoder).values()
        have = {token.content for token in found}
        files = TokenizerFiles.read(self._folder)
        copy_files(self._folder, Path(folder), SPIECE)
        missing = [token for token in files.added if token.content not in have]
        for token in missing:
            flags = {name: getattr(token, name) for name in _FLAGS}
            self._ask(self._library.add_tokens, [LibraryToken(token.content, **flags)])
            got = self._library.token_to_id(token.content)
            if token.id not in (None, got):
                raise InputError(
                    f"{self._folder} has a tokenizer whose files disagree: "
                    f"{token.content} is {token.id} in one, and would be {got}"
                )
        if missing or self._path.name != FILE:
            text = self._ask(self._library.to_str, pretty=True)
            (Path(folder) / FILE).write_text(text + "\n", "utf-8")
        else:
            shutil.copyfile(self._path, Path(folder) / FILE)

    def _ask(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """Call the library: it raises plain Exceptions, and panics that are none."""
        try:
            with _muted():
                return function(*arguments, **options)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            text = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"cannot use {self._path}: {text}") from None


def _byte_level(folder: Path) -> Library:
    """RoBERTa's tokenizer, which CodeT5 has, from its vocab.json and merges.txt."""
    files = TokenizerFiles.read(folder)
    model = models.BPE.from_file(str(folder / VOCABULARY), str(folder / MERGES))
    library = Library(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(files.add_prefix_space)
    library.decoder = decoders.ByteLevel()
    ends = [files.roles.get(role, name) for role, name in _ROBERTA]
    sep, cls = ((name, library.token_to_id(name)) for name in ends)
    library.post_processor = processors.RobertaProcessing(
        sep, cls, add_prefix_space=files.add_prefix_space
    )
    return library


def open_folder(folder: Path) -> FastTokenizer:
    """For :mod:`confined`."""
    return FastTokenizer(folder)


_muting = threading.Lock()


@contextmanager
def _muted() -> Iterator[None]:
    """Nothing goes to the process's stderr: a panic of Rust's prints a page there."""
    with _muting:
        if sys.stderr is not None:
            sys.stderr.flush()
        try:
            kept = os.dup(2)
        except OSError:  # there is none
            yield
            return
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
