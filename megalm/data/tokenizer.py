"""Text to token ids and back: a thin wrapper over Hugging Face `tokenizers`, and the training of a byte-level BPE.

Text is data, never control: `<|endoftext|>` written inside a document is encoded as ordinary characters. Only the code
here places the real end-of-document token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from megalm.data.indexed import check_exists, data_error, file_errors

END_OF_DOCUMENT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # first one found wins


class Tokenizer:
    """Ids of text. `vocab_size` is the highest id + 1; `eod_id` ends a document.

    Raises DataError if the tokenizer has no token that ends a document.
    """

    def __init__(self, inner: HFTokenizer, origin: str | Path = "tokenizer"):
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        vocab = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        end = next((token for token in KNOWN_ENDS if token in vocab), None)
        if end is None:
            fix = f"add the special token {END_OF_DOCUMENT} to it, or train one: prepare.tokenizer=''"
            rule = "the tokenizer has no token that ends a document"
            raise data_error(origin, rule, allowed=", ".join(KNOWN_ENDS), fix=fix)
        self.eod_id: int = vocab[end]

    @classmethod
    def load(cls, path: str | Path, key: str = "") -> Tokenizer:
        """Read a tokenizer.json; `key` is the setting that names it. DataError if it is missing or damaged."""
        path = Path(path)
        check_exists(path, "give the path of a tokenizer.json, or make one with `megalm prepare`", key)
        try:
            inner = HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise data_error(path, f"not a tokenizer.json: {error}") from error
        return cls(inner, path)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE, the same for the same texts. A small corpus gives fewer than `vocab_size` tokens."""
        inner = HFTokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # all 256 bytes: nothing is ever unknown
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json."""
        with file_errors(Path(path), "write"):
            Path(path).write_text(self._inner.to_str(pretty=True), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of one text, with no special token added."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        return [one.ids for one in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out, an incomplete UTF-8 sequence shows as U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=True)

    @property
    def is_byte_level(self) -> bool:
        """Every character of a token stands for one byte."""
        return isinstance(self._inner.decoder, decoders.ByteLevel)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, (V,) int64; special tokens and unused ids count 0."""
        sizes = np.zeros(self.vocab_size, np.int64)
        size = len if self.is_byte_level else _plain_size
        for token, number in self._inner.get_vocab(with_added_tokens=False).items():
            sizes[number] = size(token)
        for number, added in self._inner.get_added_tokens_decoder().items():
            sizes[number] = 0 if added.special else len(added.content.encode())
        return sizes

    def split_long(self, text: str, limit: int) -> list[str]:
        """Cut a text into pieces of about `limit` characters whose ids, joined, are the ids of the whole.

        Pieces are encoded on all cores, and in little memory. A byte-level tokenizer with GPT-2's word pattern never
        has a token across a newline that a visible character follows, so the cuts are there; others are not cut.
        """
        if len(text) <= limit or not self._cuts_at_newlines:
            return [text]
        pieces, start = [], 0
        while len(text) - start > limit:
            cut = _next_line_start(text, start + limit)
            pieces.append(text[start:cut])
            start = cut
        return [*pieces, text[start:]] if start < len(text) else pieces

    @cached_property
    def _cuts_at_newlines(self) -> bool:
        state = json.loads(self._inner.to_str())
        before = state["pre_tokenizer"] or {}
        plain = before.get("type") == "ByteLevel" and before.get("use_regex") and not before.get("add_prefix_space")
        return bool(plain and state["normalizer"] is None)


def _next_line_start(text: str, position: int) -> int:
    """The first place from `position` on where a line begins with a visible character, or the end of the text."""
    while (newline := text.find("\n", position)) >= 0:
        position = newline + 1
        if position < len(text) and not text[position].isspace():
            return position
    return len(text)


def _plain_size(token: str) -> int:
    """Bytes of a SentencePiece-like token: `<0x0A>` is one byte, U+2581 a space."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("\u2581", " ").encode())
