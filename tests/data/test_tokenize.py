"""prepare: what it makes, when it does nothing, and that a failure leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

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


def test_a_corpus_of_other_inputs_or_settings_is_not_replaced_unasked(config, tmp_path):
    prepare(config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "d.txt").write_text("seven")
    Tokenizer.train(["x y z " * 50], 260).save(tmp_path / "t.json")
    changes = {
        r"another source \(.*in, now .*other\), inputs \(": {"source": str(tmp_path / "other")},
        r"another vocabulary \(280, now 270\);": {"vocab_size": 270},
        r"another vocabulary .*, tokenizer \(trained here, now \w+\);": {"tokenizer": str(tmp_path / "t.json")},
        r"another json_key \(text, now body\);": {"json_key": "body"},
    }
    for rule, change in changes.items():
        with pytest.raises(DataError, match=rule) as caught:
            prepare(replace(config, **change))
        problem = caught.value.problems[0]
        assert (problem.key, problem.value) == ("prepare.output", config.output)
        assert problem.fix.startswith("prepare.overwrite=true")
        assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert prepare(config).reused
    assert prepare(replace(config, vocab_size=270, overwrite=True)).vocab_size == 270


def test_the_same_text_under_another_name_is_the_same_corpus(config, tmp_path):
    prepare(config)
    (tmp_path / "in").rename(tmp_path / "moved")
    assert prepare(replace(config, source=str(tmp_path / "moved"))).reused


def test_inputs_that_have_changed_are_other_inputs(config, tmp_path):
    prepare(config)
    (tmp_path / "in" / "d.txt").write_text("seven")
    with pytest.raises(DataError, match=r"another inputs \(sha256 \w{12}, now sha256 \w{12}\);"):
        prepare(config)
    config.overwrite = True
    assert prepare(config).documents == 4


def test_damage_or_overwrite_make_it_anew(config, tmp_path):
    prepare(config)
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
    config.overwrite = True
    assert prepare(config).vocab_size == 261


def test_the_manifest_says_where_it_came_from(config, tmp_path):
    summary = prepare(config)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["tool"].startswith("megalm ")
    assert manifest["inputs_sha256"] == summary.inputs_sha256
    assert manifest["files"] == summary.files and set(summary.files) == set(FILES)
    assert manifest["settings"]["vocab_size"] == 280


def test_what_was_left_out_is_said(config, tmp_path):
    for name in ("y.txt", "z.txt"):
        (tmp_path / "in" / name).write_bytes(b"\xff")
    for name in ("a.pdf", "b.csv", ".hidden"):
        (tmp_path / "in" / name).write_bytes(b"x")
    for said in (str(prepare(config)), str(prepare(config))):  # also of a corpus that was there
        assert "2 not UTF-8" in said and f"first file that is not UTF-8 is {tmp_path / 'in' / 'y.txt'}" in said
        assert "files of unknown kinds that were ignored: 2;" in said


def test_what_became_of_the_vocabulary_is_said(config, tmp_path):
    config.vocab_size = 270
    assert "note:" not in str(prepare(config))
    asked = replace(config, vocab_size=5000, output=str(tmp_path / "large"))
    assert "vocabulary is smaller than prepare.vocab_size=5000" in str(prepare(asked))
    given = replace(asked, tokenizer=str(tmp_path / "out" / "tokenizer.json"), output=str(tmp_path / "given"))
    assert "prepare.vocab_size=5000 had no effect" in str(prepare(given))


def test_the_next_command_names_what_differs_from_the_defaults(config):
    config.vocab_size = 270
    made = prepare(config)
    last = str(made).splitlines()[-1]
    assert last == f"next: megalm pretrain data.path={config.output}/corpus model.vocab_size=270"
    assert replace(made, output="data/stdlib", vocab_size=2048).next_command == "megalm pretrain"


def test_missing_tokenizer_is_refused_first(config, tmp_path):
    config.tokenizer = str(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"prepare\.tokenizer = .*none\.json\n.*does not exist"):
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
    with pytest.raises(DataError, match=r"prepare\.output = .*file/out\n.*cannot write to the folder"):
        prepare(config)
    config.output = str(tmp_path / "file")
    with pytest.raises(DataError, match=r"prepare\.output = .*file\n.*a file, and[\s\S]*prepare\.output=.*file\.corpus"):
        prepare(config)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_failure_midway_keeps_the_old_corpus(config, tmp_path, monkeypatch):
    prepare(config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "in" / "bad.jsonl").write_text("{broken")
    config.overwrite = True
    with pytest.raises(DataError, match="not a JSON object"):
        prepare(config)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(tokenize, "_encode", lambda *_: 1 / 0)
    config.output = str(tmp_path / "new")
    (tmp_path / "in" / "bad.jsonl").unlink()
    with pytest.raises(ZeroDivisionError):
        prepare(config)
    assert not (tmp_path / "new").exists()


def test_an_interruption_while_publishing_never_mixes_old_and_new(config, tmp_path, monkeypatch):
    prepare(config)
    config.vocab_size, config.overwrite = 270, True
    move = tokenize.os.replace

    def interrupted(source, target):
        if str(target).endswith("out/corpus.idx"):
            raise OSError(5, "Input/output error")
        move(source, target)

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
