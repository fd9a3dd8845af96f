"""Tokenizers: bytes, or whatever a tokenizer.json of the `tokenizers` library describes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hvdformer.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"
_MAX_FILE_BYTES = 256 * 2**20


class Tokenizer:
    """Text to token ids and back. Every document ends in `end_of_document`, which no text can spell."""

    def __init__(self, codec: _Codec, content: str) -> None:
        self._codec = codec
        self._content = content
        self.vocab_size = codec.vocab_size
        self.end_of_document = codec.end_of_document

    @classmethod
    def byte(cls) -> Tokenizer:
        """One id per byte of UTF-8, and 256 for the end of a document."""
        return cls(_Bytes(), json.dumps({"hvdformer_tokenizer": "byte"}))

    @classmethod
    def from_json(cls, content: str, source: str = "tokenizer") -> Tokenizer:
        """From the text of a tokenizer.json; `source` names it in messages.

        Raises:
            UserError: it is no tokenizer.json, or declares no end of document.
        """
        try:
            described = json.loads(content)
        except (ValueError, RecursionError):
            raise UserError(f"{source}: does not parse as JSON, expected a tokenizer.json") from None
        if isinstance(described, dict) and described.get("hvdformer_tokenizer") == "byte":
            return cls.byte()
        return cls(_Library(content, source), content)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """From a tokenizer.json."""
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise UserError(f"{path}: larger than {_MAX_FILE_BYTES >> 20} MiB, expected a tokenizer.json")
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as a tokenizer.json: {error}") from None
        return cls.from_json(content, str(path))

    def to_json(self) -> str:
        """The text of a tokenizer.json that `from_json` reads back."""
        return self._content

    @property
    def fingerprint(self) -> str:
        """sha256 of `to_json`."""
        return hashlib.sha256(self._content.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Token ids, (N,) int64, without an end of document."""
        return self._codec.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of several texts, faster than one by one."""
        return self._codec.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are no UTF-8 show as U+FFFD, an end of document as its spelling."""
        return self._codec.decode(list(ids))


class _Codec(Protocol):
    vocab_size: int
    end_of_document: int

    def encode(self, text: str) -> np.ndarray: ...
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode(self, ids: list[int]) -> str: ...


class _Bytes:
    vocab_size = 257
    end_of_document = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        parts, run = [], bytearray()
        for token in ids:
            if token < 256:
                run.append(token)
            else:
                parts += [run.decode(errors="replace"), END_OF_DOCUMENT]
                run = bytearray()
        return "".join([*parts, run.decode(errors="replace")])


class _Library:
    """A tokenizer of the `tokenizers` library, with its special tokens out of the reach of text."""

    def __init__(self, content: str, source: str) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"{source}: not a tokenizer.json that the tokenizers library reads: {error}"
            ) from None
        # A document that spells a special token gets ordinary tokens for it.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        ids = [token_id for token_id in map(self._tokenizer.token_to_id, _ENDS) if token_id is not None]
        if not ids:
            raise UserError(
                f"{source}: declares none of {', '.join(_ENDS)}, one of which has to end each document"
            )
        self.end_of_document = ids[0]
        # Not their number: ids may have gaps.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        described = json.loads(self._tokenizer.to_str())
        self._words = _Words(self._tokenizer) if _has_words_of_gpt2(described) else None

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._words is not None:
            return [self._words.encode(text) for text in texts]
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int64) for one in encoded]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _has_words_of_gpt2(described: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is a BPE of words that are split as GPT-2 does, and of nothing that goes across them."""
    words, model = described["pre_tokenizer"] or {}, described["model"]
    return (
        words.get("type") == "ByteLevel"
        and words["use_regex"]
        and not words["add_prefix_space"]
        and model["type"] == "BPE"
        and not model["dropout"]
        and described["normalizer"] is None
        and all(token["special"] for token in described["added_tokens"])
    )


class _Words:
    """A tokenizer that splits words as GPT-2 does, with a memory of words: several times as fast as the library.

    The library gives the ids of each word once. Lines with characters that are not listed here go to it whole.
    """

    # Latin, Greek, Cyrillic and Hangul letters: scripts with spaces between words. And some signs.
    _LETTERS = "A-Za-zÀ-ÖØ-öø-ʯΆΈ-ΊΌΎ-ΡΣ-ώЀ-ҁҊ-ԯ가-힣"
    _UNLISTED = re.compile(rf"[^\0-\x7f{_LETTERS}§°«»¡¿–—‘’“”„…€]")
    # The library's pattern for these: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
    _PATTERN = re.compile(
        r"'(?:[stmd]|re|ve|ll)| ?[L]+| ?[0-9]+| ?[^SL0-9]+|[S]+(?![^S])|[S]+".replace("L", _LETTERS).replace(
            "S", r" \t\n\v\f\r"
        )
    )
    # No word goes across a single end of line between visible characters, and none is another for being cut there.
    _LINE_START = re.compile(r"(?<=[!-~]\n)(?=[!-~])")
    _MAX_CHARACTERS = 2**22  # of all words in memory: then it begins anew

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, bytes] = {}  # as 4-byte numbers
        self._characters = 0

    def encode(self, text: str) -> np.ndarray:
        if self._is_listed(text):
            ids = self._encode_words(text)
        else:
            runs = groupby(self._LINE_START.split(text), self._is_listed)
            ids = b"".join(
                self._encode_words("".join(lines)) if is_listed else self._encode_whole("".join(lines))
                for is_listed, lines in runs
            )
        return np.frombuffer(ids, dtype=np.uint32).astype(np.int64)

    def _is_listed(self, text: str) -> bool:
        return text.isascii() or not self._UNLISTED.search(text)

    def _encode_words(self, text: str) -> bytes:
        words = self._PATTERN.findall(text)
        new = [word for word in set(words) if word not in self._ids]
        if new:
            self._learn(new, words)
        return b"".join(map(self._ids.__getitem__, words))

    def _learn(self, new: list[str], words: list[str]) -> None:
        """The ids of words that were not seen before; `words`: all that are needed now."""
        if self._characters > self._MAX_CHARACTERS:
            self._ids.clear()
            self._characters = 0
            new = list(set(words))
        self._characters += sum(map(len, new))
        encoded = self._tokenizer.encode(new, is_pretokenized=True, add_special_tokens=False)
        ids = np.array(encoded.ids, dtype=np.uint32)
        begins = np.searchsorted(np.array(encoded.word_ids, dtype=np.int64), np.arange(len(new) + 1))
        for word, begin, end in zip(new, begins[:-1].tolist(), begins[1:].tolist(), strict=True):
            self._ids[word] = ids[begin:end].tobytes()

    def _encode_whole(self, text: str) -> bytes:
        (encoded,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoded.ids, dtype=np.uint32).tobytes()


_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
