"""The tokenizer: round trips, safety of its control token, byte counts, cutting of long texts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from megalm.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from megalm.errors import DataError

TEXTS = ["def add(a, b):\n    return a + b\n" * 20, "class Word:\n\n    def __init__(self):\n        pass\n" * 20]
TOKENIZER = Tokenizer.train(TEXTS, 280)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_round_trip(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.token_bytes()[ids].sum() == len(text.encode())


def test_training_gives_what_was_asked_and_is_deterministic():
    assert TOKENIZER.vocab_size == 280
    assert Tokenizer.train(TEXTS, 280)._inner.to_str() == TOKENIZER._inner.to_str()
    assert len(TOKENIZER.encode(TEXTS[0])) < len(TEXTS[0]) * 0.6


def test_end_of_document_in_a_text_is_plain_text():
    ids = TOKENIZER.encode(f"a{END_OF_DOCUMENT}b")
    assert TOKENIZER.eod_id not in ids
    assert TOKENIZER.decode(ids) == f"a{END_OF_DOCUMENT}b"
    assert TOKENIZER.decode([*ids, TOKENIZER.eod_id]) == f"a{END_OF_DOCUMENT}b"


def test_batch_equals_single():
    assert TOKENIZER.encode_batch(TEXTS) == [TOKENIZER.encode(text) for text in TEXTS]


def test_save_and_load(tmp_path):
    TOKENIZER.save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert (loaded.vocab_size, loaded.eod_id) == (TOKENIZER.vocab_size, TOKENIZER.eod_id)
    assert loaded.encode(TEXTS[1]) == TOKENIZER.encode(TEXTS[1])


def test_token_bytes_of_the_end_is_zero():
    sizes = TOKENIZER.token_bytes()
    assert sizes.shape == (280,) and sizes.dtype == np.int64
    assert sizes[TOKENIZER.eod_id] == 0 and (np.delete(sizes, TOKENIZER.eod_id) > 0).all()


def test_token_bytes_of_a_sentencepiece_like_vocabulary():
    vocab = {"</s>": 0, "<0x0A>": 1, "\u2581a": 2, "\u00e9": 3, "unused gap before": 5}
    inner = HFTokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(inner)
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (0, 6)
    assert tokenizer.token_bytes().tolist() == [0, 1, 2, 2, 0, 17]


line = st.text(st.sampled_from("ab \n\t\u00e9\u3000'1_"), max_size=12)


@given(st.lists(line, max_size=12), st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_pieces_have_the_ids_of_the_whole(lines, limit):
    text = "\n".join(lines)
    pieces = TOKENIZER.split_long(text, limit)
    assert "".join(pieces) == text
    assert [i for ids in TOKENIZER.encode_batch(pieces) for i in ids] == TOKENIZER.encode(text)


@pytest.mark.parametrize("text", TEXTS)
def test_indented_code_may_be_cut_anywhere(text):
    for limit in range(1, 60):
        pieces = TOKENIZER.split_long(text, limit)
        assert [i for ids in TOKENIZER.encode_batch(pieces) for i in ids] == TOKENIZER.encode(text)


def test_long_texts_are_really_cut():
    assert len(TOKENIZER.split_long(TEXTS[0], 100)) > 4
    assert TOKENIZER.split_long("no newline " * 50, 100) == ["no newline " * 50]


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"normalizer": normalizers.Strip()},
    ],
)
def test_tokenizer_of_another_pattern_is_not_cut(change):
    inner = HFTokenizer.from_str(TOKENIZER._inner.to_str())
    for name, value in change.items():
        setattr(inner, name, value)
    assert Tokenizer(inner).split_long(TEXTS[0], 100) == [TEXTS[0]]


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Tokenizer.load(tmp_path / "none.json")


@pytest.mark.parametrize("content", ["", "{}", "not json", "[1]"])
def test_damaged_file(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "t.json")


def test_without_an_end_token(tmp_path):
    inner = HFTokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    inner.save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match="no token that ends a document"):
        Tokenizer.load(tmp_path / "t.json")


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match="cannot write"):
        TOKENIZER.save(tmp_path / "no folder" / "t.json")
