"""Tokenizers: text comes back, and no text can spell a special token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
