"""Tokenizers as their authors meant them: the checkpoint's own files are the truth.

The oracles are SentencePiece itself on ``spiece.model``, and the tokenizers library on
a ``tokenizer.json`` as it was found; what transformers 5 makes of either is none.
"""

import json
import random
import shutil
from itertools import product
from pathlib import Path

import pytest
import sentencepiece
from conftest import save_tokenizer_confined, tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    ByteLevelBPETokenizer,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Library

from pair import Pair
from system.errors import InputError
from text.fast_tokenizer import FILE, FastTokenizer
from text.spiece_tokenizer import SpieceTokenizer
from text.tokenizer import TextStream, Tokenizer, have_equal_files, reader_of
from text.tokenizer_files import TokenizerFiles

LINE = "the cat sat on a mat and saw dogs run over red green hills das Haus ist"
WORDS = LINE.split()
TEXTS = st.text(
    st.one_of(
        st.sampled_from("abcdehilmnorst ACTH▁{}<>\n\t  ."),
        st.characters(blacklist_categories=("Cs",)),
    ),
    max_size=40,
)

FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def train(folder: Path, **options) -> sentencepiece.SentencePieceProcessor:
    """A small model, in ``folder/spiece.model``; SentencePiece's own reading of it."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    lines = [" ".join(chance.choices(WORDS, k=7)) for _ in range(300)]
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        **{"vocab_size": 70, "hard_vocab_limit": False, **ids, **options},
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "spiece"),
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))


def configure(folder: Path, **fields) -> None:
    named = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    values = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, **named, **fields}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


#: What SentencePiece can be trained to: kinds, and settings of every sort.
KINDS = {
    "unigram": {},
    "bpe": {"model_type": "bpe"},
    "char": {"model_type": "char"},
    "word": {"model_type": "word", "vocab_size": 16},
}
SETTINGS = {
    "plain": {},
    "bytes": {"byte_fallback": True, "vocab_size": 330},
    "unknown first": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
    "no dummy prefix": {"add_dummy_prefix": False},
    "spaces kept": {"remove_extra_whitespaces": False},
    "spaces behind": {"treat_whitespace_as_suffix": True},
    "identity": {"normalization_rule_name": "identity"},
    "lower case": {"normalization_rule_name": "nfkc_cf"},
    "own symbols": {"user_defined_symbols": ["<2de>", "▁cat", "H"]},
    "control symbols": {"control_symbols": ["<ctrl>"]},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function: (SentencePiece's own, ours) for a kind and settings."""
    made = {}

    def build(kind: str, setting: str):
        if (kind, setting) not in made:
            folder = tmp_path_factory.mktemp("spiece")
            options = KINDS[kind] | SETTINGS[setting]
            if kind == "word":
                options.pop("byte_fallback", None)
                options["vocab_size"] = 16
            theirs = train(folder, **options)
            configure(folder)
            made[kind, setting] = theirs, SpieceTokenizer(folder)
        return made[kind, setting]

    return build


def stream(decode, ids: list[int]) -> str:
    out = TextStream(decode)
    return "".join([*(out.push(each) for each in ids), out.finish()])


@pytest.mark.parametrize("kind, setting", product(KINDS, SETTINGS))
@given(text=TEXTS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_kind_of_sentencepiece(trained, kind, setting, text):
    """Ids, text, and text as it streams: SentencePiece's own, 0 differ."""
    theirs, ours = trained(kind, setting)
    # Special tokens in a text are transformers' doing: they stand for themselves.
    for token in ("</s>", "<unk>", "<pad>"):
        text = text.replace(token, "")
    ids = theirs.encode(text)
    assert ours.encode(text) == [*ids, theirs.eos_id()]
    known = [each for each in ids if each != theirs.unk_id()]
    assert ours.decode(known, True) == theirs.decode(known)
    if "\ufffd" not in theirs.decode(known):
        assert stream(lambda run: ours.decode(run, True), known) == theirs.decode(known)


def test_an_unknown_character_ends_no_prompt(tmp_path):
    """MADLAD's <unk> is 0, and 2 is its end of sequence."""
    theirs = train(tmp_path, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    configure(tmp_path)
    ids = SpieceTokenizer(tmp_path).encode("the {cat} 😀 sat")
    assert ids == [*theirs.encode("the {cat} 😀 sat"), 2]
    assert ids.count(2) == 1
    assert 0 in ids


def test_sentinels(tmp_path):
    """T5's hundred are implied, and count down from the end of the vocabulary; they
    take the spaces around them along."""
    theirs = train(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    ours = SpieceTokenizer(tmp_path)
    size = theirs.get_piece_size()
    ids = ours.ids()
    assert ids["<extra_id_0>"] == size + 99
    assert ids["<extra_id_99>"] == size
    assert len(ids) == size + 100
    cat, sat = theirs.encode("the cat"), theirs.encode("sat on")
    for text in ("the cat<extra_id_7>sat on", "the cat  <extra_id_7>  sat on"):
        assert ours.encode(text) == [*cat, size + 92, *sat, 1]
    assert ours.decode([*cat, size + 92, *sat, 1], True) == "the cat sat on"
    shown = ours.decode([*cat, size + 92, *sat], False)
    assert shown == "the cat <extra_id_7> sat on"
    brace = {"content": "{", "special": False, **FLAGS}
    close = brace | {"content": "}"}
    decoder = {str(size): brace, str(size + 1): close}
    configure(tmp_path, added_tokens_decoder=decoder)
    braces = SpieceTokenizer(tmp_path)
    text = "the { cat } sat"
    assert braces.decode(braces.encode(text), True) == text
    assert stream(lambda run: braces.decode(run, True), braces.encode(text)) == text
    assert ours.encode("the cat</s>") == [*cat, 1]
    assert ours.encode("") == [1]


def test_text_after_a_special_token(tmp_path):
    """Before 2023 it began as a word, spaced or not; with legacy false it does not."""
    theirs = train(tmp_path)
    sentinel = theirs.get_piece_size() + 99
    for legacy, begins in ((None, True), (True, True), (False, False)):
        configure(tmp_path, extra_ids=100, legacy=legacy)
        ids = SpieceTokenizer(tmp_path).encode("<extra_id_0>sat")
        assert ids[0] == sentinel
        pieces = [theirs.id_to_piece(each) for each in ids[1:-1]]
        assert pieces[0].startswith("▁") == begins, pieces


def test_text_that_begins_where_a_token_ends(tmp_path):
    """Without legacy, what follows a special token is read as it stands: no piece
    reaches into it, and none is lost."""
    pieces = [">>", "k>>", "y", "▁y", ">"]
    train(tmp_path, user_defined_symbols=pieces)
    configure(tmp_path, extra_ids=100, legacy=False)
    ours = SpieceTokenizer(tmp_path)
    ids = ours.ids()
    sentinel = ids["<extra_id_0>"]
    assert ours.encode("<extra_id_0>>y") == [sentinel, ids[">"], ids["y"], 1]
    assert ours.encode("<extra_id_0>y")[:2] == [sentinel, ids["y"]]


@pytest.mark.parametrize("kind", ["MT5Tokenizer", "T5TokenizerFast", None])
def test_other_names_of_t5s_tokenizer(tmp_path, kind):
    train(tmp_path)
    settings = {"extra_ids": 0} | ({"tokenizer_class": kind} if kind else {})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = SpieceTokenizer(tmp_path)
    assert ours.encode("the cat</s>") == ours.encode("the cat")
    assert ours.decode([0, *ours.encode("the cat")], True) == "the cat"


def test_a_map_that_is_out_of_date(tmp_path):
    """Since tokens are in tokenizer_config.json, the older file is not read."""
    train(tmp_path)
    token = {"content": "</s>", "special": True, **FLAGS}
    configure(tmp_path, added_tokens_decoder={"1": token})
    stale = json.dumps({"eos_token": "<eos>"})
    (tmp_path / "special_tokens_map.json").write_text(stale)
    ours = SpieceTokenizer(tmp_path)
    assert ours.encode("the cat")[-1] == 1
    assert "<eos>" not in ours.ids()


@pytest.mark.parametrize("where", ["decoder", "map", "names", "newer", "added"])
def test_added_tokens_of_every_generation(tmp_path, where):
    """The same token, as files have said it over the years."""
    theirs = train(tmp_path)
    size = theirs.get_piece_size()
    token = {"content": "<sep>", **FLAGS, "lstrip": True}
    fields = {}
    if where == "decoder":
        fields["added_tokens_decoder"] = {str(size): token | {"special": True}}
    elif where == "map":
        special = {"additional_special_tokens": [token]}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<sep>": size}))
    elif where == "newer":
        fields["extra_special_tokens"] = ["<sep>"]
    elif where == "names":
        fields["additional_special_tokens"] = ["<sep>"]
    else:
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<sep>": size}))
    configure(tmp_path, **fields)
    ours = SpieceTokenizer(tmp_path)
    assert ours.ids()["<sep>"] == size
    ids = ours.encode("the cat <sep>sat")
    assert ids == [*theirs.encode("the cat"), size, *theirs.encode("sat"), 1]
    hidden = "the cat sat" if where != "added" else "the cat <sep> sat"
    assert ours.decode(ids, True) == hidden


def test_a_token_that_stands_alone(tmp_path):
    train(tmp_path)
    token = {"content": "cat", **FLAGS, "single_word": True, "special": True}
    configure(tmp_path, added_tokens_decoder={"200": token})
    ours = SpieceTokenizer(tmp_path)
    assert 200 in ours.encode("the cat sat")
    assert 200 not in ours.encode("the cats")
    assert 200 not in ours.encode("a_cat")


@pytest.mark.parametrize(
    "name, text",
    [
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"3": {"content": 4}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [3]}'),
        ("tokenizer_config.json", '{"extra_ids": 1000000000}'),
        ("tokenizer_config.json", '{"eos_token": 3}'),
        ("tokenizer_config.json", '{"additional_special_tokens": "a"}'),
        ("special_tokens_map.json", '{"additional_special_tokens": [[]]}'),
        ("added_tokens.json", '{"a": -1}'),
        ("added_tokens.json", '{"a": 1e400}'),
        ("added_tokens.json", "[]"),
    ],
)
def test_files_that_say_nothing(tmp_path, name, text):
    train(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=name):
        SpieceTokenizer(tmp_path)


def test_a_damaged_model(tmp_path):
    for raw in (b"", b"\0" * 99, b"version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "spiece.model").write_bytes(raw)
        with pytest.raises(InputError, match=r"spiece\.model|no piece"):
            SpieceTokenizer(tmp_path)


META = pre_tokenizers.Metaspace()


def unigram(normalizer=None, pre=META, post="$A </s>", extra=()) -> Library:
    library = Library(models.Unigram())
    library.pre_tokenizer = pre
    library.decoder = decoders.Metaspace()
    if normalizer:
        library.normalizer = normalizer
    chance = random.Random(0)
    lines = [" ".join(chance.choices([*WORDS, "12"], k=7)) for _ in range(300)]
    trainer = trainers.UnigramTrainer(
        vocab_size=90,
        special_tokens=["<pad>", "</s>", "<unk>", *extra],
        unk_token="<unk>",
        show_progress=False,
    )
    library.train_from_iterator(lines, trainer)
    special = [(each, library.token_to_id(each)) for each in ("</s>", *extra)]
    library.post_processor = processors.TemplateProcessing(post, None, special)
    return library


FOUND = {
    "lower case, digits": lambda: unigram(
        normalizers.Sequence(
            [
                normalizers.Nmt(),
                normalizers.NFKC(),
                normalizers.Replace(Regex(" {2,}"), " "),
                normalizers.Lowercase(),
            ]
        ),
        pre_tokenizers.Sequence(
            [META, pre_tokenizers.Digits(True), pre_tokenizers.Punctuation()]
        ),
    ),
    "lines kept": lambda: unigram(
        pre=pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), META])
    ),
    "a token before": lambda: unigram(post="[S2S] $A </s>", extra=["[S2S]"]),
    "no end of sequence": lambda: unigram(post="$A"),
    "first alone": lambda: unigram(
        pre=pre_tokenizers.Metaspace(prepend_scheme="first"), extra=["<x>"]
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A function: (the library's own, ours once it is converted)."""
    made = {}

    def build(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp("found")
            library = FOUND[name]()
            for each in ("hf", "mlx"):
                (folder / each).mkdir()
            library.save(str(folder / "hf" / FILE))
            configure(folder / "hf", tokenizer_class="T5TokenizerFast")
            FastTokenizer(folder / "hf").save(str(folder / "mlx"))
            made[name] = library, Tokenizer(folder / "mlx")
        return made[name]

    return build


@pytest.mark.parametrize("name", FOUND)
@given(text=TEXTS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tokenizer_json_is_kept_as_found(found, name, text):
    library, ours = found(name)
    text = text.replace("</s>", "")
    ids = library.encode(text).ids
    if name != "first alone" or "<" not in text:
        assert ours.encode(text) == ids
    assert ours.decode(ids) == library.decode(ids)


def test_the_file_is_copied_byte_by_byte(tmp_path):
    (tmp_path / "mlx").mkdir()
    FOUND["lines kept"]().save(str(tmp_path / FILE))
    FastTokenizer(tmp_path).save(str(tmp_path / "mlx"))
    assert (tmp_path / "mlx" / FILE).read_bytes() == (tmp_path / FILE).read_bytes()


def test_special_tokens_that_only_another_file_names(tmp_path):
    """A tokenizer.json without its sentinels: transformers 4 added them on loading."""
    (tmp_path / "mlx").mkdir()
    unigram().save(str(tmp_path / FILE))
    names = [f"<extra_id_{i}>" for i in range(3)]
    configure(tmp_path, extra_ids=3, additional_special_tokens=names)
    FastTokenizer(tmp_path).save(str(tmp_path / "mlx"))
    ours = Tokenizer(tmp_path / "mlx")
    ids = ours.encode("the<extra_id_1>cat")
    assert ours.ids["<extra_id_1>"] in ids
    assert ours.decode(ids) == "the cat"
    decoder = {"3": {"content": "<far>", "special": True}}
    configure(tmp_path, added_tokens_decoder=decoder)
    with pytest.raises(InputError, match="files disagree"):
        FastTokenizer(tmp_path).save(str(tmp_path / "mlx"))


@pytest.mark.parametrize("in_config", [False, True])
def test_codet5s_files(tmp_path, in_config):
    """vocab.json and merges.txt; sentinels whose flags only objects have."""
    library = ByteLevelBPETokenizer()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    code = ["def add(a, b):\n    return a + b\n", "public static void main()"] * 40
    library.train_from_iterator(code, 400, special_tokens=special, show_progress=False)
    library.save_model(str(tmp_path))
    size = library.get_vocab_size()
    names = [f"<extra_id_{i}>" for i in range(9, -1, -1)]
    ids = {name: size + place for place, name in enumerate(names)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
    tokens = [{"content": name, **FLAGS, "lstrip": True} for name in names]
    named = {"bos_token": "<s>", "cls_token": "<s>", "sep_token": "</s>"}
    map_ = named | {"additional_special_tokens": tokens}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(map_))
    more = {"additional_special_tokens": tokens} if in_config else {}
    configure(tmp_path, tokenizer_class="RobertaTokenizer", **named, **more)
    assert reader_of(tmp_path) == "text.fast_tokenizer"
    (tmp_path / "mlx").mkdir()
    save_tokenizer_confined(tmp_path, tmp_path / "mlx")
    ours = Tokenizer(tmp_path / "mlx")
    assert all(ours.ids[name] == number for name, number in ids.items())
    head, tail = library.encode("def f(x):").ids, library.encode(" return").ids
    expected = [1, *head, ids["<extra_id_0>"], *tail, 2]
    assert ours.encode("def f(x): <extra_id_0> return") == expected
    assert ours.decode(expected) == "def f(x): return"


def test_two_forms_that_disagree(tmp_path, capsys):
    """Said in a line, and tokenizer.json wins; said nothing where they agree."""
    pieces = train(tmp_path / "a")
    configure(tmp_path / "a")
    library = unigram()
    library.save(str(tmp_path / "a" / FILE))
    (tmp_path / "b").mkdir()
    save_tokenizer_confined(tmp_path / "a", tmp_path / "b")
    assert "read some texts differently" in capsys.readouterr().err
    ours = Tokenizer(tmp_path / "b")
    assert ours.encode("the cat sat") == library.encode("the cat sat").ids
    vocabulary = [
        (pieces.id_to_piece(i), pieces.get_score(i))
        for i in range(pieces.get_piece_size())
    ]
    same = Library(models.Unigram(vocabulary, unk_id=2))
    same.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex("\\s+"), " ")]
    )
    same.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), META]
    )
    same.decoder = decoders.Metaspace()
    same.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    same.add_special_tokens(["</s>", "<pad>", "<unk>"])
    same.save(str(tmp_path / "a" / FILE))
    (tmp_path / "c").mkdir()
    save_tokenizer_confined(tmp_path / "a", tmp_path / "c")
    assert capsys.readouterr().err == ""


def test_no_tokenizer_at_all(tmp_path):
    """transformers makes one up; a ByT5 without its files is told what to do."""
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(InputError, match="--tokenizer"):
        save_tokenizer_confined(tmp_path, tmp_path)


def test_which_file_is_read(tmp_path):
    """tokenizer.json before spiece.model, as transformers has it; others elsewhere."""
    assert reader_of(tmp_path) == "text.slow_tokenizer"
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").touch()
    configure(tmp_path, tokenizer_class="GPT2Tokenizer")
    assert reader_of(tmp_path) == "text.slow_tokenizer"
    configure(tmp_path, tokenizer_class="RobertaTokenizerFast")
    assert reader_of(tmp_path) == "text.fast_tokenizer"
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "spiece.model").touch()
    assert reader_of(tmp_path) == "text.spiece_tokenizer"
    (tmp_path / FILE).touch()
    assert reader_of(tmp_path) == "text.fast_tokenizer"


def test_flags_come_from_whoever_has_them(tmp_path):
    """Objects before names, wherever they stand."""
    token = {"content": "<a>", **FLAGS, "lstrip": True}
    configure(tmp_path, additional_special_tokens=["<a>", "<b>"], tokenizer_class="X")
    special = {"additional_special_tokens": [token]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    added = {token.content: token for token in TokenizerFiles.read(tmp_path).added}
    assert added["<a>"].lstrip
    assert not added["<b>"].lstrip
    assert added["<a>"].special and added["<b>"].special
    assert not added["<b>"].normalized


@pytest.mark.parametrize(
    "name, equal",
    [(None, True), (FILE, False), ("tokenizer_config.json", False), ("x.txt", True)],
)
def test_equal_files_are_an_equal_tokenizer(tmp_path, name, equal):
    """As those of a converted pair mostly are: the second need not be read."""
    tiny_tokenizer().save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    if name:
        with (tmp_path / "b" / name).open("a") as file:
            file.write(" ")
    assert have_equal_files(tmp_path / "a", tmp_path / "b") == equal
    (tmp_path / "a" / "added_tokens.json").write_text("{}")
    assert not have_equal_files(tmp_path / "a", tmp_path / "b")
    assert not have_equal_files(tmp_path / "b", tmp_path / "a")


def test_of_an_equal_pair_one_tokenizer_is_read(make, monkeypatch):
    read = []
    init = Tokenizer.__init__

    def watched(self, folder):
        read.append(folder)
        init(self, folder)

    target, draft = make()[2], make(num_decoder_layers=1)[2]
    monkeypatch.setattr(Tokenizer, "__init__", watched)
    Pair.load(str(target), str(draft))
    assert read == [target]
