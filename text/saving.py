"""A checkpoint's tokenizer, saved beside the converted weights."""

from contextlib import suppress
from pathlib import Path

from system.errors import InputError, say
from system.files import is_file
from text.confined import Confined
from text.fast_tokenizer import FILE
from text.tokenizer import Tokenizer, reader_of
from text.tokenizer_files import SPIECE

#: Texts of many kinds, that a tokenizer has to read as it did before.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  spaces   of all kinds,\ttabs\nand lines \u00a0 \u3000 ",
    "Grüße, naïve façade; ŁÓDŹ № ½ ﬁne ﷺ",
    "漢字とかな 한국어 हिन्दी العربية עברית ไทย Ελληνικά кириллица",
    "😀👩‍👩‍👧 {braces} [brackets] <tags> `code` a_b = x*y != 0;",
    "<extra_id_0> between <extra_id_1>, <2de> </s> <pad> at the end <extra_id_99>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 1234567890 Donaudampfschifffahrtsgesellschaft",
)


def save_tokenizer(source: Path, folder: Path) -> None:
    """Write the source's tokenizer into ``folder``: its own files, as they are.

    Only what has no other form is written anew: CodeT5's two files as a tokenizer.json,
    others through transformers.

    Raises:
        InputError: there is none, it is damaged, takes more than it may, or reads
            texts in another way afterwards.
    """
    reader = Confined(reader_of(source), source)
    reader.call("save", str(folder.resolve()))
    saved = Tokenizer(folder)
    read = [reader.call("encode", probe) for probe in PROBES]
    if [saved.encode(probe) for probe in PROBES] != read:
        raise InputError(
            f"the tokenizer of {source} reads texts in another way once it is saved: "
            f"it is not converted"
        )
    del reader
    if is_file(source / SPIECE) and is_file(source / FILE):
        with suppress(InputError):  # it is not used
            pieces = Confined("text.spiece_tokenizer", source)
            if [pieces.call("encode", probe) for probe in PROBES] != read:
                say(
                    f"{FILE} and {SPIECE} read some texts differently: {FILE} is used, "
                    f"as transformers does"
                )
