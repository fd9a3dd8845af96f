"""Tokenizers: bytes, or whatever a tokenizer.json of the `tokenizers` library describes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

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
        """`encode` of several texts, in parallel where the library can."""
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
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int64) for one in encoded]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
