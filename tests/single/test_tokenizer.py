"""Tokenizers: text comes back, and no text can spell a special token."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdformer.data import sources
from hvdformer.data.shards import token_dtype
from hvdformer.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from hvdformer.errors import UserError


@pytest.fixture(scope="module")
def foreign():
    """A tokenizer.json as the tokenizers library writes it: byte-level BPE with a special token."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["the cat and the hat and the end of text"] * 10, trainer)
    return library.to_str()


@given(st.text())
def test_bytes_come_back(text):
    tokenizer = Tokenizer.byte()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


@given(st.text())
def test_bpe_comes_back(foreign, text):
    tokenizer = Tokenizer.from_json(foreign)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_text_cannot_inject_the_end_of_a_document(foreign, kind):
    tokenizer = Tokenizer.byte() if kind == "byte" else Tokenizer.from_json(foreign)
    text = f"a {END_OF_DOCUMENT} b"
    for ids in (tokenizer.encode(text), tokenizer.encode_batch([text])[0]):
        assert tokenizer.end_of_document not in ids.tolist()
        assert tokenizer.decode(ids) == text
    assert 0 <= tokenizer.end_of_document < tokenizer.vocab_size


def test_a_tokenizer_reads_back_what_it_writes(foreign, tmp_path):
    for tokenizer in (Tokenizer.byte(), Tokenizer.from_json(foreign)):
        (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        again = Tokenizer.load(tmp_path / "tokenizer.json")
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode("the hat").tolist() == tokenizer.encode("the hat").tolist()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 1}', "null"])
def test_what_is_no_tokenizer_is_refused_in_words(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_tokenizer_without_an_end_of_document_is_refused():
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    with pytest.raises(UserError, match="declares none of"):
        Tokenizer.from_json(Library(models.BPE()).to_str())


# Text of words, blanks and ends of lines, with the characters that a split of words may get wrong.
WORDS = st.text(
    st.sampled_from("aZé²數0٣жΩ한…—'_ \t\n\r\v\f\x1c\x1f\x85\xa0\u2003.-!<|>")
    | st.characters(codec="utf-8")
    | st.characters(max_codepoint=127),
    max_size=60,
) | st.lists(st.sampled_from(["the", " hat", "'s", "'ll", "\n", "\n\n", "  ", "é\n", "a\n", "12", "!'"])).map(
    "".join
)


@given(st.lists(WORDS, min_size=1, max_size=4))
@settings(max_examples=500, deadline=None)
def test_the_memory_of_words_gives_the_ids_that_the_library_gives(foreign, texts):
    """encode() is the library's own; encode_batch() goes by the memory of words."""
    tokenizer = Tokenizer.from_json(foreign)
    assert tokenizer._codec._words is not None
    tokenizer._codec._words._MAX_CHARACTERS = 20  # so that it is emptied too
    for _ in range(2):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert ids.tolist() == tokenizer.encode(text).tolist()


def test_the_memory_of_words_splits_at_each_listed_character_as_the_library_does(foreign):
    codec = Tokenizer.from_json(foreign)._codec
    listed = [chr(code) for code in range(0x110000) if not codec._words._UNLISTED.search(chr(code))]
    assert len(listed) > 12_000
    for text in ("".join(f"a{c}1{c}, {c}b" for c in listed), "".join(f"{c} {c}\n{c}\t\t" for c in listed)):
        split = codec._tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert codec._words._PATTERN.findall(text) == [text[start:end] for _, (start, end) in split]


@given(
    st.lists(
        st.sampled_from(["the hat", " the", "\n", "\n\n", "\t\t", "  ", "é", "a\nb", "it's", "語"]),
        min_size=60,
    ),
)
@settings(max_examples=200, deadline=None)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(foreign, parts):
    """Each of these parts has a place to cut at."""
    text = "".join(part + "he is" for part in parts)
    tokenizer = Tokenizer.from_json(foreign)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", 40)
        pieces = [piece for piece, _ in sources._pieces(text)]
    assert len(pieces) > 5
    ids = [number for piece in tokenizer.encode_batch(pieces) for number in piece.tolist()]
    assert ids == tokenizer.encode(text).tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        },
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            }
        },
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
    ],
)
def test_a_tokenizer_of_another_kind_goes_by_the_library_alone(foreign, change):
    tokenizer = Tokenizer.from_json(json.dumps(json.loads(foreign) | change))
    text = "the cat\n and  the hat's end"
    assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text).tolist()
    assert tokenizer._codec._words is None


@pytest.mark.parametrize("largest,dtype", [(2**16 - 1, "<u2"), (2**16, "<u4")])
def test_ids_with_gaps_count_up_to_the_largest(foreign, largest, dtype):
    """Its number of tokens is not what decides whether an id fits."""
    described = json.loads(foreign)
    vocabulary = described["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = largest
    tokenizer = Tokenizer.from_json(json.dumps(described))
    assert tokenizer.vocab_size == largest + 1
    assert token_dtype(tokenizer.vocab_size) == np.dtype(dtype)
