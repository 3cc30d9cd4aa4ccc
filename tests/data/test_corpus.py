"""Opening a corpus: what is known of its tokens, what is refused, and what its fingerprint depends on."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from megalm.config.data import DataConfig, PrepareConfig
from megalm.data import corpus as corpus_module
from megalm.data.corpus import open_corpus
from megalm.data.indexed import IndexedWriter
from megalm.data.tokenize import MANIFEST, prepare
from megalm.data.tokenizer import Tokenizer
from megalm.errors import DataError


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"document {i} of ten\n" * 20)
    return folder


@pytest.fixture
def prepared(text_folder, tmp_path):
    prepare(PrepareConfig(source=str(text_folder), output=str(tmp_path / "out"), vocab_size=270))
    return DataConfig(path=str(tmp_path / "out" / "corpus"), seq_length=16, split="0.8,0.2,0")


@pytest.fixture
def bare(tmp_path):
    """Tokens with neither manifest nor tokenizer, as another tool leaves them."""
    with IndexedWriter(tmp_path / "bare", 100) as writer:
        for start in range(10):
            writer.add_document(np.arange(start, start + 20))
    return DataConfig(path=str(tmp_path / "bare"), seq_length=16, split="1,0,0")


def test_prepared_corpus(prepared):
    corpus = open_corpus(prepared, 270)
    assert corpus.tokenizer and corpus.tokenizer.vocab_size == corpus.vocab_size == 270
    assert corpus.test is None and corpus.valid is not None
    assert len(corpus.train.documents) + len(corpus.valid.documents) == 10
    counts = np.bincount(corpus.indexed.tokens)
    shares = counts[counts > 0] / counts.sum()
    assert corpus.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum())


def test_bare_tokens_are_counted(bare, monkeypatch):
    monkeypatch.setattr(corpus_module, "SCAN_CHUNK", 7)
    corpus = open_corpus(bare, 29)
    assert (corpus.vocab_size, corpus.tokenizer, corpus.valid) == (29, None, None)
    counts = np.bincount(corpus.indexed.tokens)
    assert corpus.unigram_entropy == pytest.approx(-(counts / 200 * np.log(counts / 200)).sum())


def test_tokenizer_alone_tells_the_vocabulary(bare, prepared):
    bare.tokenizer = prepared.path.replace("corpus", "tokenizer.json")
    corpus = open_corpus(bare, 270)
    assert (corpus.vocab_size, corpus.unigram_entropy) == (270, None)


@pytest.mark.parametrize(("kind", "needed"), [("prepared", 270), ("bare", 29)])
def test_vocabulary_larger_than_the_models(request, kind, needed):
    config = request.getfixturevalue(kind)
    with pytest.raises(DataError, match="no embedding") as caught:
        open_corpus(config, needed - 1)
    problem = caught.value.problems[0]
    assert (problem.key, problem.value, problem.fix) == ("model.vocab_size", needed - 1, f"model.vocab_size={needed}")


def test_the_vocabulary_that_is_proposed_can_be_shared_out(prepared):
    for multiple_of, proposed in ((4, 272), (27, 270)):
        with pytest.raises(DataError) as caught:
            open_corpus(prepared, 100, multiple_of=multiple_of)
        assert caught.value.problems[0].fix == f"model.vocab_size={proposed}"


def test_negative_ids(tmp_path, bare):
    (tmp_path / "bare.bin").write_bytes(np.full(100, -1, "<i4").tobytes())
    index = bytearray((tmp_path / "bare.idx").read_bytes())
    index[17] = 4  # four bytes per token, ten documents of ten
    index[34:74] = np.full(10, 10, "<i4").tobytes()
    index[74:154] = np.arange(0, 400, 40, dtype="<i8").tobytes()
    (tmp_path / "bare.idx").write_bytes(index)
    with pytest.raises(DataError, match="negative"):
        open_corpus(bare, 100)


def test_manifest_of_another_corpus(prepared, tmp_path):
    path = tmp_path / "out" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokens": 5}))
    with pytest.raises(DataError, match="another corpus"):
        open_corpus(prepared, 270)


def test_manifest_of_other_tokens_in_the_folder_is_not_used(prepared, tmp_path):
    with IndexedWriter(tmp_path / "out" / "mine", 260) as writer:
        writer.add_document(range(250))
    corpus = open_corpus(replace(prepared, path=str(tmp_path / "out" / "mine"), split="1,0,0"), 270)
    assert corpus.unigram_entropy is None


def test_tokenizer_smaller_than_the_corpus(prepared, tmp_path):
    Tokenizer.train(["x"], 258).save(tmp_path / "small.json")
    with pytest.raises(DataError, match="the tokenizer has 257 tokens, the corpus was made with 270"):
        open_corpus(replace(prepared, tokenizer=str(tmp_path / "small.json")), 270)


def test_missing_tokenizer(prepared):
    with pytest.raises(DataError, match=r"data\.tokenizer = none\.json\n.*does not exist"):
        open_corpus(replace(prepared, tokenizer="none.json"), 270)


@pytest.mark.parametrize("end", ["", "/", "/corpus.bin", "/corpus.idx"])
def test_the_prefix_that_was_meant(prepared, tmp_path, end):
    path = f"{tmp_path}/out{end}"
    with pytest.raises(DataError) as caught:
        open_corpus(replace(prepared, path=path), 270)
    problem = caught.value.problems[0]
    assert (problem.key, problem.value, problem.fix) == ("data.path", path, f"data.path={prepared.path}")


@pytest.mark.parametrize(("split", "name"), [("1,0,0", "train"), ("0.8,0.2,0", "train"), ("0,1,0", "train")])
def test_split_without_a_sample(prepared, split, name):
    with pytest.raises(DataError, match=f"the {name} split has"):
        open_corpus(replace(prepared, split=split, seq_length=100_000), 270)


def test_validation_without_a_sample(prepared):
    corpus = open_corpus(prepared, 270)
    length = corpus.valid.num_tokens
    with pytest.raises(DataError, match=r"the valid split has[\s\S]*fix: +train\.eval_every=0$"):
        open_corpus(replace(prepared, seq_length=length), 270)
    open_corpus(replace(prepared, seq_length=length - 1), 270)
    assert open_corpus(replace(prepared, seq_length=length), 270, evaluates=False).valid is None


def test_test_without_a_sample(prepared):
    with pytest.raises(DataError, match="the test split has") as caught:
        open_corpus(replace(prepared, split="0.6,0.3,0.1", seq_length=300), 270)
    assert caught.value.problems[0].fix == """'data.split="0.6,0.3,0"'"""
    assert open_corpus(replace(prepared, split="0.6,0.3,0", seq_length=300), 270).test is None


def test_one_document_is_enough_to_train(tmp_path):
    (tmp_path / "one.txt").write_text("all there is\n" * 30)
    prepare(PrepareConfig(source=str(tmp_path / "one.txt"), output=str(tmp_path / "out"), vocab_size=270))
    config = DataConfig(path=str(tmp_path / "out" / "corpus"), seq_length=16)
    corpus = open_corpus(config, 270, evaluates=False)
    assert (len(corpus.train.documents), corpus.valid, corpus.test) == (1, None, None)
    with pytest.raises(DataError, match="the valid split has 0 tokens"):
        open_corpus(config, 270)


def test_fingerprint_names_what_decides_the_samples(prepared, bare):
    first = open_corpus(prepared, 270).fingerprint()
    assert first == open_corpus(replace(prepared, split="80,20,0"), 270).fingerprint()
    others = [replace(prepared, seed=1), replace(prepared, seq_length=8), replace(prepared, split="0.7,0.3,0"), bare]
    others += [replace(prepared, fold=0, num_folds=2), replace(prepared, fold=1, num_folds=2)]
    assert len({first, *(open_corpus(config, 270).fingerprint() for config in others)}) == 7


def test_folds_share_the_documents_out(prepared):
    folds = [open_corpus(replace(prepared, fold=fold, num_folds=2, split="1,0,0"), 270) for fold in (0, 1)]
    validating = [set(fold.valid.documents.tolist()) for fold in folds]
    assert validating[0] == set(folds[1].train.documents.tolist()) and not validating[0] & validating[1]


def test_fingerprint_sees_where_documents_end(tmp_path):
    found = set()
    for name, lengths in (("a", (10, 30)), ("b", (20, 20))):
        with IndexedWriter(tmp_path / name, 100) as writer:
            for length in lengths:
                writer.add_document(range(length))
        found.add(open_corpus(DataConfig(path=str(tmp_path / name), seq_length=8, split="1,0,0"), 100).fingerprint())
    assert len(found) == 2
