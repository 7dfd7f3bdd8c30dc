"""text.py: streaming gives the decoded whole, and never part of a character."""

import pytest
from conftest import VOCABULARY, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from system.errors import InputError
from text.tokenizer import FILE, TextStream, Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


def byte_decode(tokens: list[int]) -> str:
    """ByT5's way: an id is a byte, three further on."""
    return bytes(t - 3 for t in tokens if t >= 3).decode("utf-8", errors="replace")


def stream(decode, tokens: list[int]) -> list[str]:
    out = TextStream(decode)
    return [*(out.push(token) for token in tokens), out.finish()]


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=30))
def test_pieces_make_the_whole(tokenizer, tokens):
    """Spaces lost or doubled, special tokens, byte pieces in any order."""
    pieces = "".join(stream(tokenizer.decode, tokens))
    whole = tokenizer.decode(tokens)
    # A run of bytes that are no characters is decoded as one, or as several.
    assert pieces.replace("\ufffd", "") == whole.replace("\ufffd", "")
    assert pieces == whole or "\ufffd" in whole


@given(st.text(max_size=12), st.binary(max_size=3))
def test_bytes_wait_for_their_character(text, tail):
    """Every character comes whole, and a tail that stays unfinished is not lost."""
    tokens = [byte + 3 for byte in text.encode() + tail]
    pieces = stream(byte_decode, tokens)
    assert "".join(pieces) == byte_decode(tokens)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces[: len(text.encode())])


def test_a_character_of_four_tokens(tokenizer):
    """Byte pieces of one emoji: nothing until the last of them."""
    vocabulary = tokenizer.ids
    emoji = [vocabulary[f"<0x{byte:02X}>"] for byte in "😀".encode()]
    cat = vocabulary["▁cat"]
    pieces = stream(tokenizer.decode, [cat, *emoji, cat])
    assert pieces == ["cat", "", "", "", "😀", " cat", ""]
    assert stream(tokenizer.decode, [cat, *emoji[:2]])[-1] == "\ufffd" * 2


@pytest.mark.parametrize("text", ["the cat sat", " sat  on the cat", "é漢😀", ""])
def test_same_ids_as_transformers(folder, tokenizer, text):
    """The fast path reads tokenizer.json itself: end of sequence, spaces and all."""
    reference = tiny_tokenizer()
    assert tokenizer.encode(text) == reference(text).input_ids
    assert tokenizer.size == len(reference) == VOCABULARY


def test_settings_of_training_batches_are_ignored(folder, tmp_path):
    """Some checkpoints carry truncation to 512 tokens in their tokenizer.json."""
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_file(str(folder / FILE))
    fast.enable_truncation(4)
    fast.enable_padding(length=9)
    fast.save(str(tmp_path / FILE))
    for text in ("cat", "cat " * 20):
        assert Tokenizer(tmp_path).encode(text) == Tokenizer(folder).encode(text)


def test_same_size_is_not_the_same_tokenizer(folder, tokenizer, tmp_path):
    assert tokenizer.same_ids(Tokenizer(folder))
    other = tiny_tokenizer()
    text = (folder / FILE).read_text(encoding="utf-8")
    text = text.replace('"▁cat"', '"▁dog"')
    other.save_pretrained(tmp_path)
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    changed = Tokenizer(tmp_path)
    assert changed.size == tokenizer.size
    assert not tokenizer.same_ids(changed)
    assert tokenizer.difference(Tokenizer(folder)) == ""
    found = "token 5 is '▁dog' in one and '▁cat' in the other"
    assert tokenizer.difference(changed) == found
    shorter = Tokenizer(tmp_path)
    shorter.ids = {t: i for t, i in tokenizer.ids.items() if i != 7} | {"x" * 99: 200}
    assert tokenizer.difference(shorter).startswith("token 7 is none in one and ")
    tokenizer_of_it = Tokenizer(tmp_path)
    tokenizer_of_it.ids = {**tokenizer.ids, "x" * 99: 200}
    assert f"token 200 is '{'x' * 40}...'" in tokenizer.difference(tokenizer_of_it)


@pytest.mark.parametrize("single", ["$A </s>", "<pad> $A", "</s> $A </s>", "$A"])
def test_words_without_what_goes_around_a_prompt(tmp_path, single):
    """A word that itself begins or ends with such a token keeps its own."""
    tokenizer = tiny_tokenizer()
    around = [("</s>", 1), ("<pad>", 0)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=around
    )
    tokenizer.save_pretrained(tmp_path)
    ours = Tokenizer(tmp_path)
    for text in ("the cat", "</s>the", "cat</s>", "<pad>a</s>", "a"):
        expected = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        assert ours.encode_word(text) == expected.ids


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(InputError, match="no tokenizer"):
        Tokenizer(tmp_path)


def test_broken_tokenizer(tmp_path):
    (tmp_path / FILE).write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        Tokenizer(tmp_path)
