"""prepare: what it makes, when it does nothing, and that a failure leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from megalm.config.data import PrepareConfig
from megalm.data import tokenize
from megalm.data.indexed import IndexedDataset
from megalm.data.tokenize import FILES, MANIFEST, entropy, prepare, read_manifest
from megalm.data.tokenizer import Tokenizer
from megalm.errors import DataError

TEXTS = {"a.txt": "one two three\n" * 30, "b.txt": "four \u00e9 five\n" * 20, "c.txt": "six"}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "in").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "in" / name).write_text(text, encoding="utf-8")
    return PrepareConfig(source=str(tmp_path / "in"), output=str(tmp_path / "out"), vocab_size=280)


def test_the_corpus_is_the_text(config, tmp_path):
    summary = prepare(config)
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    indexed = IndexedDataset(tmp_path / "out" / "corpus")
    documents = [indexed.document(i) for i in range(indexed.num_documents)]
    assert [tokenizer.decode(ids[:-1]) for ids in documents] == list(TEXTS.values())
    assert all(ids[-1] == tokenizer.eod_id and tokenizer.eod_id not in ids[:-1] for ids in documents)
    assert (summary.documents, summary.tokens, summary.vocab_size) == (3, indexed.num_tokens, tokenizer.vocab_size)
    assert summary.bytes == sum(len(text.encode()) for text in TEXTS.values())
    assert summary.bytes == tokenizer.token_bytes()[indexed.tokens].sum()
    assert summary.unigram_entropy_nats == pytest.approx(entropy(np.bincount(indexed.tokens)))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES, MANIFEST}


def test_pieces_and_batches_do_not_change_the_tokens(config, tmp_path, monkeypatch):
    whole = prepare(config)
    monkeypatch.setattr(tokenize, "PIECE", 20)
    monkeypatch.setattr(tokenize, "BATCH", 100)
    config.output = str(tmp_path / "other")
    assert prepare(config).files == whole.files


def test_a_second_run_does_nothing(config, tmp_path):
    first = prepare(config)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    second = prepare(config)
    assert second.reused and not first.reused
    assert (second.tokens, second.files, second.skipped) == (first.tokens, first.files, first.skipped)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert "nothing to do" in str(second) and "made in" in str(first)


def test_other_inputs_settings_or_damage_make_it_anew(config, tmp_path):
    prepare(config)
    (tmp_path / "in" / "d.txt").write_text("seven")
    assert prepare(config).documents == 4
    config.vocab_size = 270
    assert prepare(config).vocab_size == 270
    (tmp_path / "out" / "corpus.bin").write_bytes(b"damage")
    assert not prepare(config).reused
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert not prepare(config).reused
    assert prepare(config).reused
    config.overwrite = True
    assert not prepare(config).reused


def test_an_existing_tokenizer_is_used(config, tmp_path):
    Tokenizer.train(["x y z " * 50], 260).save(tmp_path / "t.json")
    config.tokenizer = str(tmp_path / "t.json")
    assert prepare(config).vocab_size == 260
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "t.json").read_bytes()
    assert prepare(config).reused
    Tokenizer.train(["other words " * 50], 261).save(tmp_path / "t.json")
    assert prepare(config).vocab_size == 261


def test_the_manifest_says_where_it_came_from(config, tmp_path):
    summary = prepare(config)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["tool"].startswith("megalm ")
    assert manifest["inputs_sha256"] == summary.inputs_sha256
    assert manifest["files"] == summary.files and set(summary.files) == set(FILES)
    assert manifest["settings"]["vocab_size"] == 280


def test_what_was_left_out_is_said(config, tmp_path):
    (tmp_path / "in" / "z.txt").write_bytes(b"\xff")
    assert "1 not UTF-8" in str(prepare(config))


def test_missing_tokenizer_is_refused_first(config, tmp_path):
    config.tokenizer = str(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"none\.json[\s\S]*does not exist"):
        prepare(config)
    assert not (tmp_path / "out").exists()


def test_empty_corpus(config, tmp_path):
    for name in TEXTS:
        (tmp_path / "in" / name).write_text("  \n")
    with pytest.raises(DataError, match=r"prepare\.source[\s\S]*corpus is empty[\s\S]*3 blank"):
        prepare(config)
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    config.output = str(tmp_path / "file" / "out")
    with pytest.raises(DataError, match="cannot write to the folder"):
        prepare(config)
    config.output = str(tmp_path / "file")
    with pytest.raises(DataError, match="cannot write to the folder"):
        prepare(config)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_failure_midway_keeps_the_old_corpus(config, tmp_path, monkeypatch):
    prepare(config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "in" / "bad.jsonl").write_text("{broken")
    with pytest.raises(DataError, match="not a JSON object"):
        prepare(config)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(tokenize, "_encode", lambda *_: 1 / 0)
    config.overwrite, config.output = True, str(tmp_path / "new")
    (tmp_path / "in" / "bad.jsonl").unlink()
    with pytest.raises(ZeroDivisionError):
        prepare(config)
    assert not (tmp_path / "new").exists()


def test_an_interruption_while_publishing_never_mixes_old_and_new(config, tmp_path, monkeypatch):
    prepare(config)
    config.vocab_size = 270
    replace = tokenize.os.replace

    def interrupted(source, target):
        if str(target).endswith("out/corpus.idx"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize.os, "replace", interrupted)
        with pytest.raises(DataError, match="Input/output error"):
            prepare(config)
    with pytest.raises(DataError, match=r"corpus\.idx[\s\S]*does not exist"):
        IndexedDataset(tmp_path / "out" / "corpus")
    assert not prepare(config).reused and IndexedDataset(tmp_path / "out" / "corpus").num_documents == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"tokens": 1}'])
def test_damaged_manifest(config, tmp_path, content):
    prepare(config)
    (tmp_path / "out" / MANIFEST).write_text(content)
    with pytest.raises(DataError, match=r"not a manifest[\s\S]*prepare.overwrite=true"):
        prepare(config)
    config.overwrite = True
    assert not prepare(config).reused
    assert read_manifest(tmp_path / "out")["documents"] == 3


def test_entropy():
    assert entropy(np.array([5, 5, 0])) == pytest.approx(np.log(2))
    assert entropy(np.array([7])) == 0


def test_torch_is_not_imported():
    code = "import sys, megalm.data.corpus, megalm.data.tokenize; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
