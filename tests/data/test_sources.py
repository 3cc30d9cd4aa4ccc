"""Sources: which files, in which order, what is left out, and what is refused."""

from __future__ import annotations

import json

import pytest

from megalm.config.data import PrepareConfig
from megalm.data.sources import open_source
from megalm.errors import DataError


def source_of(path, **settings):
    return open_source(PrepareConfig(source=str(path), **settings))


def test_folder_is_walked_in_path_order(tmp_path):
    for name in ["b.txt", "a/z.md", "a/b/c.py", "a.txt", "no.bin", ".hidden.txt", ".git/x.txt", "__pycache__/y.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    source = source_of(tmp_path)
    assert list(source.documents()) == ["a.txt", "a/b/c.py", "a/z.md", "b.txt"]
    assert source.ignored == 1  # no.bin; what is hidden is not counted


def test_what_is_not_text_is_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "b.txt").write_text(" \n\t")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "one"}\n\n{"text": "\xff"}\n{"text": ""}\n{"text": "two"}')
    source = source_of(tmp_path)
    assert list(source.documents()) == ["with a mark", "one", "two"]
    assert source.skipped == {"not UTF-8": 2, "blank": 2}
    assert source.not_utf8 == tmp_path / "a.txt"
    list(source.documents())
    assert source.skipped == {"not UTF-8": 2, "blank": 2}  # of the last pass, not of all


def test_json_lines_of_another_key(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"body": "x", "text": "y"}))
    assert list(source_of(tmp_path / "d.jsonl", json_key="body").documents()) == ["x"]


def test_half_a_surrogate_pair_becomes_a_character(tmp_path):
    (tmp_path / "d.jsonl").write_text(r'{"text": "a\ud83d \ud83d\ude00"}')
    assert list(source_of(tmp_path / "d.jsonl").documents()) == ["a? \U0001f600"]


@pytest.mark.parametrize(
    ("line", "rule", "allowed"),
    [
        ("{broken", "not a JSON object", ""),
        ("[1, 2]", "no text under the key 'text'", ""),
        ('{"body": "x", "n": 1}', "no text under the key 'text'", "body"),
        ('{"text": 5}', "no text under the key 'text'", ""),
    ],
)
def test_bad_json_line_is_named(tmp_path, line, rule, allowed):
    (tmp_path / "d.jsonl").write_text('{"text": "good"}\n' + line)
    with pytest.raises(DataError, match=rule) as caught:
        list(source_of(tmp_path / "d.jsonl").documents())
    assert caught.value.problems[0].key.endswith("d.jsonl:2")
    assert caught.value.problems[0].allowed == allowed


def test_hash_depends_on_names_and_contents(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    first = source_of(tmp_path).sha256()
    assert source_of(tmp_path).sha256() == first
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    second = source_of(tmp_path).sha256()
    (tmp_path / "b.txt").write_text("y")
    third = source_of(tmp_path).sha256()
    (tmp_path / "folder").mkdir()
    (tmp_path / "b.txt").rename(tmp_path / "folder" / "b.txt")
    assert len({first, second, third, source_of(tmp_path).sha256()}) == 4


def test_standard_library():
    source = source_of("stdlib")
    names = {path.relative_to(source.root).as_posix() for path in source.files}
    assert {"json/decoder.py", "argparse.py"} <= names
    assert not any({"test", "tests", "idlelib", "lib2to3", "site-packages"} & set(name.split("/")) for name in names)
    assert 9e6 < source.num_bytes() < 14e6
    assert source.ignored == 0 and {path.suffix for path in source.files} == {".py"}


def test_missing_source(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        source_of(tmp_path / "none")


def test_file_of_unknown_kind(tmp_path):
    (tmp_path / "x.pdf").write_text("x")
    with pytest.raises(DataError, match=r"unknown kind[\s\S]*x\.pdf\.txt"):
        source_of(tmp_path / "x.pdf")


def test_folder_without_text(tmp_path):
    (tmp_path / "x.bin").write_text("x")
    with pytest.raises(DataError, match="no file of a known kind"):
        source_of(tmp_path)


def test_file_that_vanishes(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    source = source_of(tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match="cannot read"):
        list(source.documents())


def test_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match="cannot list: Permission denied"):
        source_of(tmp_path)
