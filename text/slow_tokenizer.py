"""Tokenizers and chat templates through transformers, for a confined process alone.

transformers knows every layout that a tokenizer was ever saved in, and does with a
folder's files whatever they ask for. So this is imported by :mod:`confined`'s process
and by no other.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import logging

from system.errors import InputError
from system.files import is_file, require_files
from text.tokenizer_files import FILES


class SlowTokenizer:
    """The folder's tokenizer as transformers has it."""

    def __init__(self, folder: Path):
        """
        Raises:
            InputError: there is none, or it is damaged.
        """
        self._tokenizer = _load(folder)

    def ids(self) -> dict[str, int]:
        """Every token's id."""
        return self._tokenizer.get_vocab()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that its model expects."""
        return self._tokenizer(text).input_ids

    def decode(self, tokens: list[int], skip_special: bool) -> str:
        """Text of token ids, with or without special tokens, spaces as they were."""
        return self._tokenizer.decode(
            tokens,
            skip_special_tokens=skip_special,
            clean_up_tokenization_spaces=False,
        )

    def has_chat_template(self) -> bool:
        """Whether :meth:`encode_chat` has one to go by."""
        return self._tokenizer.chat_template is not None

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation whose next message is the assistant's.

        Raises:
            InputError: the chat template is not for these messages.
        """
        try:
            return self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # templates are programs
            raise InputError(f"the chat template fails: {error}") from None

    def save(self, folder: str) -> None:
        """Write it into ``folder``."""
        self._tokenizer.save_pretrained(folder)
        # Further chat templates, of which a T5 has no use.
        for path in Path(folder).iterdir():
            if path.is_dir():
                shutil.rmtree(path)


def open_folder(folder: Path) -> SlowTokenizer:
    """For :mod:`confined`."""
    return SlowTokenizer(folder)


def _load(folder: Path) -> Any:
    logging.set_verbosity_error()
    require_files(folder)
    if not any(is_file(folder / name) for name in FILES):
        # transformers would make one up.
        raise InputError(
            f"{folder} has no tokenizer: name the folder of the model that it was made "
            f"from (convert.py --tokenizer)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # damaged files make it raise anything
        raise InputError(f"{folder} has no tokenizer that loads: {error}") from None
    # Without its files transformers makes up an empty one; ByT5's has none to miss.
    files = tokenizer.vocab_files_names.values()
    if files and not any(is_file(folder / file) for file in files):
        raise InputError(f"{folder} has no tokenizer: none of {', '.join(files)}")
    return tokenizer
