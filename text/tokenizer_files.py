"""What a checkpoint's tokenizer files say of its added tokens, of any generation.

transformers has kept them in four places over the years. They are read here as version
4 read them, which is what the models were trained with and published for:

- ``tokenizer_config.json``: ``added_tokens_decoder``, an id and flags each, since 4.34;
- ``added_tokens.json``: ids alone, before;
- ``special_tokens_map.json`` and ``tokenizer_config.json``: which tokens are special,
  by name, or as objects whose flags count;
- T5's sentinels, ``<extra_id_0>`` to 99, which its tokenizer implies where no others
  are named.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from system.errors import InputError
from system.files import is_file, read_json, typed

CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"
SPIECE = "spiece.model"

#: The files that a tokenizer is read from, one or the other.
FILES = {
    *("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json", "merges.txt"),
    *("vocab.txt", "tokenizer_config.json"),
}

#: What names a special token in either file; the others name several.
_ROLES = (
    *("bos_token", "eos_token", "unk_token", "sep_token"),
    *("pad_token", "cls_token", "mask_token"),
)
_OTHERS = ("additional_special_tokens", "extra_special_tokens")

#: Tokenizers that have T5's sentinels, and these tokens, though no file says so.
_IMPLIES = ("T5Tokenizer", "T5TokenizerFast", "MT5Tokenizer", "MT5TokenizerFast")
_SENTINELS = 100
_T5 = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


class _Token(Struct):
    """A token as an object."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None
    special: bool | None = None


class _Config(Struct):
    """What is read of tokenizer_config.json."""

    tokenizer_class: str | None = None
    legacy: bool | None = None
    add_prefix_space: bool | None = None
    added_tokens_decoder: dict[str, _Token] | None = None
    extra_ids: Annotated[int, Meta(ge=0, le=10_000)] | None = None


@dataclass(frozen=True)
class AddedToken:
    """A token that a text is split at before anything else.

    Attributes:
        content: as it stands in a text.
        id: None where the files do not say.
        lstrip, rstrip: whether it takes the spaces before it, or after it, along.
        single_word: whether it has to stand alone.
        normalized: whether it is looked for in the normalized text.
        special: whether it is left out of a text that is decoded.
    """

    content: str
    id: int | None = None
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True
    special: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """The settings of a checkpoint's tokenizer.

    Attributes:
        kind: the tokenizer's class, without Fast; "" where it is not named.
        added: its added tokens, those with ids first, by id.
        roles: special tokens by what they are for: ``eos_token`` and so on.
        legacy: whether a text after a special token begins as one after a space does,
            as in all T5s before 2023.
        add_prefix_space: whether a byte-level text begins as one after a space does.
    """

    kind: str
    added: list[AddedToken]
    roles: dict[str, str]
    legacy: bool
    add_prefix_space: bool

    @classmethod
    def read(
        cls, folder: Path, implied: str = "", slow: bool = False
    ) -> "TokenizerFiles":
        """Read them.

        Args:
            implied: the class where none is named.
            slow: as T5Tokenizer, whose sentinels take the spaces around them along
                where no file says else; T5TokenizerFast's do not.

        Raises:
            InputError: a file is no JSON, or a field is of another kind.
        """
        values = read_json(folder / CONFIG, optional=True)
        config = typed(values, _Config, str(folder / CONFIG))
        kind = config.tokenizer_class or implied
        # Since there is added_tokens_decoder, the older file is not looked at.
        older = config.added_tokens_decoder is None
        special = read_json(folder / SPECIAL, optional=True) if older else {}
        roles: dict[str, _Token] = {}
        if kind in _IMPLIES:
            roles = {role: _Token(name) for role, name in _T5.items()}
        for source, name in ((values, CONFIG), (special, SPECIAL)):
            for role in _ROLES:
                if source.get(role) is not None:
                    roles[role] = _token(source[role], folder / name)
        # Objects have flags, names have none: whoever has them is believed.
        known = _others(special, folder / SPECIAL) | _others(values, folder / CONFIG)
        for token in _others(special, folder / SPECIAL).values():
            if token.normalized is not None:
                known[token.content] = token
        sentinels = [name for name in known if "<extra_id_" in name]
        count = _SENTINELS if config.extra_ids is None else config.extra_ids
        if kind in _IMPLIES and not sentinels:
            sentinels = [f"<extra_id_{number}>" for number in range(count)]
            known |= {name: _Token(name) for name in sentinels}
        for name in sentinels if slow and kind in _IMPLIES else ():
            if known[name].normalized is None:
                known[name] = _Token(name, lstrip=True, rstrip=True, normalized=False)
        named = {token.content: token for token in roles.values()} | known
        return cls(
            kind=kind.removesuffix("Fast"),
            added=_merge(folder, config, named),
            roles={role: token.content for role, token in roles.items()},
            legacy=config.legacy is not False,
            add_prefix_space=bool(config.add_prefix_space),
        )


def _merge(folder: Path, config: _Config, named: dict[str, _Token]) -> list[AddedToken]:
    """All added tokens: those with an id, and special ones that are only named."""
    added: dict[str, AddedToken] = {}
    if config.added_tokens_decoder is not None:
        for text, token in config.added_tokens_decoder.items():
            one = _added(token, special=bool(token.special))
            added[token.content] = replace(one, id=_id(text, folder / CONFIG))
    else:
        ids = read_json(folder / ADDED, optional=True)
        for content, number in ids.items():
            token = named.get(content, _Token(content))
            one = _added(token, special=content in named)
            added[content] = replace(one, id=_id(number, folder / ADDED))
    for content, token in named.items():
        if content not in added:
            added[content] = _added(token, special=True)
        else:
            added[content] = replace(added[content], special=True)
    ordered = sorted(
        (token for token in added.values() if token.id is not None),
        key=lambda token: token.id,
    )
    return [*ordered, *(token for token in added.values() if token.id is None)]


def _added(token: _Token, special: bool) -> AddedToken:
    normalized = not special if token.normalized is None else token.normalized
    return AddedToken(
        token.content,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=normalized,
        special=special,
    )


def _token(value: Any, path: Path) -> _Token:
    """A token that is named, or an object."""
    if isinstance(value, str):
        return _Token(value)
    if isinstance(value, dict):
        return typed(value, _Token, str(path))
    raise InputError(f"{path} names a special token that is no text")


def _others(values: dict[str, Any], path: Path) -> dict[str, _Token]:
    """The further special tokens that a file names."""
    found: dict[str, _Token] = {}
    for name in _OTHERS:
        tokens = values.get(name) or []
        if isinstance(tokens, dict):  # by names of their own
            tokens = list(tokens.values())
        if not isinstance(tokens, list):
            raise InputError(f"{path} has {name} that are no list")
        for token in (_token(each, path) for each in tokens):
            found.setdefault(token.content, token)
    return found


def _id(value: Any, path: Path) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if type(number) is not int or not 0 <= number < 1 << 31:
        raise InputError(f"{path} gives a token an id that is none")
    return number


def copy_files(source: Path, folder: Path, *further: str) -> None:
    """Copy the settings that are there, and what else is named, as they are."""
    for name in (CONFIG, SPECIAL, ADDED, "chat_template.jinja", *further):
        if is_file(source / name):
            shutil.copyfile(source / name, folder / name)
