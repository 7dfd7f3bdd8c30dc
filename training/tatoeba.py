"""Tatoeba sentence pairs as training text: zip archives in, tab-separated files out.

    python training/tatoeba.py data/deu-eng.zip --max-words 8 --output data/german \\
        --held-out data/dev.en.txt data/test.en.txt

The archives are manythings.org's selection of tatoeba.org (CC BY 2.0): one pair a line,
English first. Every source gets T5's task prefix, so one model can learn several
languages. ``--held-out`` names files of English sentences; the pairs whose English side
is in one are written to a file of that name, all others to ``train.tsv``.
"""

import random
import sys
import unicodedata
import zipfile
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system.errors import InputError, Parser, run

LANGUAGES = {"deu": "German", "fra": "French", "ron": "Romanian"}


def normalise(text: str) -> str:
    """NFKC, and plain spaces for the narrow ones before French punctuation."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def pairs(archive: Path) -> tuple[str, list[tuple[str, str]]]:
    """The language of an archive and its (English, translation) pairs, normalised.

    Raises:
        InputError: it is no archive of a language that is known here.
    """
    code = archive.name.split("-")[0]
    if code not in LANGUAGES:
        known = ", ".join(f"{each}-eng.zip" for each in LANGUAGES)
        raise InputError(f"{archive} is none of {known}")
    try:
        with zipfile.ZipFile(archive) as file:
            lines = file.read(f"{code}.txt").decode("utf-8").split("\n")
    except (OSError, zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {archive}: {error}") from None
    columns = [line.split("\t") for line in lines if "\t" in line]
    return LANGUAGES[code], [(normalise(row[0]), normalise(row[1])) for row in columns]


def main() -> None:
    parser = Parser(
        prog="tatoeba.py",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("archives", type=Path, nargs="+", help="deu-eng.zip, …")
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--max-words", type=int, help="longest English sentence kept")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    held_out = {
        path.name.split(".")[0]: {
            normalise(line) for line in path.read_text("utf-8").split("\n")
        }
        for path in args.held_out
    }
    if len(held_out) < len(args.held_out) or "train" in held_out:
        raise InputError("the held-out files need different names, and not 'train'")
    # By source: the translations of one stay together.
    splits: dict[str, dict[str, list[str]]] = {
        name: {} for name in ["train", *held_out]
    }
    for archive in args.archives:
        language, rows = pairs(archive)
        for english, translation in rows:
            if args.max_words and len(english.split()) > args.max_words:
                continue
            split = next(
                (name for name, held in held_out.items() if english in held), "train"
            )
            source = f"translate English to {language}: {english}"
            splits[split].setdefault(source, []).append(translation)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, translations in splits.items():
        # The archives are sorted by length: the first lines would be no fair sample.
        sources = list(translations)
        random.Random(0).shuffle(sources)
        lines = [
            f"{source}\t{translation}\n"
            for source in sources
            for translation in translations[source]
        ]
        (args.output / f"{name}.tsv").write_text("".join(lines), "utf-8")
        print(f"{len(lines):8,} pairs: {args.output / name}.tsv", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(main, "tatoeba.py"))
