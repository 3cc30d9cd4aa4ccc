"""Indexed tokens: exact bytes, reading back, and an error for every kind of damage."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from megalm.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from megalm.errors import DataError

DOCUMENTS = [[1, 2, 3], [4], [65499, 0]]


def write(prefix: Path, documents=DOCUMENTS, vocab_size: int = 65500) -> Path:
    with IndexedWriter(prefix, vocab_size) as writer:
        for ids in documents:
            writer.add_document(ids)
    return prefix


def index_bytes(
    *, magic=b"MMIDIDX\0\0", version=1, code=8, lengths=(3, 1, 2), offsets=(0, 6, 8), bounds=(0, 1, 2, 3)
) -> bytes:
    count = len(lengths)
    head = magic + struct.pack("<QBQQ", version, code, count, len(bounds))
    return head + struct.pack(f"<{count}i{len(offsets)}q{len(bounds)}q", *lengths, *offsets, *bounds)


def test_golden_bytes_two_per_token(tmp_path):
    prefix = tmp_path / "two"
    with IndexedWriter(prefix, 65499) as writer:
        for ids in [[1, 2, 3], [4], [65498, 0]]:
            writer.add_document(ids)
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 4, 65498, 0)
    assert Path(f"{prefix}.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", 8)
        + struct.pack("<Q", 3)
        + struct.pack("<Q", 4)
        + struct.pack("<3i", 3, 1, 2)
        + struct.pack("<3q", 0, 6, 8)
        + struct.pack("<4q", 0, 1, 2, 3)
    )


def test_golden_bytes_four_per_token(tmp_path):
    prefix = write(tmp_path / "four", vocab_size=65500)
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack("<6i", 1, 2, 3, 4, 65499, 0)
    assert Path(f"{prefix}.idx").read_bytes() == index_bytes(code=4, offsets=(0, 12, 16))
    assert Path(f"{prefix}.idx").stat().st_size == 42 + 20 * 3


def test_token_type_changes_at_65500():
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


def test_reads_back_what_was_written(tmp_path):
    indexed = IndexedDataset(write(tmp_path / "a.b" / "corpus.v1"))
    assert (indexed.num_documents, indexed.num_tokens) == (3, 6)
    assert indexed.document_lengths.tolist() == [3, 1, 2]
    assert [indexed.document(i).tolist() for i in range(3)] == DOCUMENTS
    assert indexed.read(0, 1, 2).tolist() == [2, 3]
    assert indexed.read(1, 1, 0).tolist() == []


@pytest.mark.parametrize(("offset", "length"), [(0, 4), (-1, 1), (3, 1), (1, -1)])
def test_reading_past_a_document_is_refused(tmp_path, offset, length):
    with pytest.raises(IndexError, match="document 0 has 3 tokens"):
        IndexedDataset(write(tmp_path / "corpus")).read(0, offset, length)


def test_sentences_are_read_as_documents(tmp_path):
    (tmp_path / "s.bin").write_bytes(struct.pack("<6H", *range(6)))
    (tmp_path / "s.idx").write_bytes(index_bytes(bounds=(0, 2, 2, 3)))  # two sentences, none, one
    indexed = IndexedDataset(tmp_path / "s")
    assert [indexed.document(i).tolist() for i in range(3)] == [[0, 1, 2, 3], [], [4, 5]]


DAMAGES = {
    "magic": (index_bytes(magic=b"MMIDIDX\0\1"), "does not begin with MMIDIDX"),
    "short": (b"MMIDIDX\0\0" + b"\1", "does not begin with MMIDIDX"),
    "version": (index_bytes(version=2), "unknown version"),
    "float tokens": (index_bytes(code=7), "no integer type"),
    "unknown code": (index_bytes(code=0), "no integer type"),
    "one byte less": (index_bytes()[:-1], "has another size"),
    "one byte more": (index_bytes() + b"\0", "has another size"),
    "no sequences": (index_bytes(lengths=(), offsets=(), bounds=(0,)), "corpus is empty"),
    "no tokens": (index_bytes(lengths=(0,), offsets=(0,), bounds=(0, 1)), "corpus is empty"),
    "negative length": (index_bytes(lengths=(3, -1, 4)), "negative length"),
    "offsets fall": (index_bytes(offsets=(0, 8, 6)), "offsets must increase: sequence 1"),
    "offset gap": (index_bytes(offsets=(0, 6, 10)), "offsets must increase: sequence 2"),
    "bounds start": (index_bytes(bounds=(1, 1, 2, 3)), "document bounds must rise"),
    "bounds end": (index_bytes(bounds=(0, 1, 2, 2)), "document bounds must rise"),
    "bounds fall": (index_bytes(bounds=(0, 2, 1, 3)), "document bounds must rise"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_index_is_named(tmp_path, damage):
    raw, rule = DAMAGES[damage]
    (tmp_path / "c.bin").write_bytes(bytes(12))
    (tmp_path / "c.idx").write_bytes(raw)
    with pytest.raises(DataError, match=rule) as caught:
        IndexedDataset(tmp_path / "c")
    problem = caught.value.problems[0]
    assert problem.key == str(tmp_path / "c.idx") and problem.fix


def test_undamaged_index_of_the_same_form_is_read(tmp_path):
    (tmp_path / "c.bin").write_bytes(bytes(12))
    (tmp_path / "c.idx").write_bytes(index_bytes())
    assert IndexedDataset(tmp_path / "c").num_tokens == 6


@pytest.mark.parametrize(("size", "rule"), [(10, "truncated"), (14, "longer than its index says"), (0, "truncated")])
def test_token_file_of_another_size(tmp_path, size, rule):
    (tmp_path / "c.bin").write_bytes(bytes(size))
    (tmp_path / "c.idx").write_bytes(index_bytes())
    with pytest.raises(DataError, match=rule) as caught:
        IndexedDataset(tmp_path / "c")
    assert caught.value.problems[0].key.endswith("c.bin")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_file(tmp_path, suffix):
    prefix = write(tmp_path / "c")
    Path(f"{prefix}.{suffix}").unlink()
    with pytest.raises(DataError, match=rf"data\.path = {prefix}\n.*c\.{suffix} does not exist"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("ids", "rule"),
    [
        ([], "length that the index cannot hold"),
        (np.broadcast_to(np.uint8(0), 2**31), "length that the index cannot hold"),
        ([1, 10], "token id outside the vocabulary"),
        ([1, -1], "token id outside the vocabulary"),
    ],
)
def test_bad_document_leaves_nothing_behind(tmp_path, ids, rule):
    with pytest.raises(DataError, match=rule), IndexedWriter(tmp_path / "c", 10) as writer:
        writer.add_document([1])
        writer.add_document(ids)
    assert list(tmp_path.iterdir()) == []


def test_no_document_is_an_empty_corpus(tmp_path):
    with pytest.raises(DataError, match="no document"), IndexedWriter(tmp_path / "c", 10):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_the_files_that_were_there(tmp_path):
    prefix = write(tmp_path / "c")
    with pytest.raises(KeyboardInterrupt), IndexedWriter(prefix, 10) as writer:
        writer.add_document([9])
        raise KeyboardInterrupt
    assert IndexedDataset(prefix).document(0).tolist() == DOCUMENTS[0]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write"), IndexedWriter(tmp_path / "file" / "c", 10):
        pass


def test_a_disk_that_is_full(tmp_path):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    with pytest.raises(DataError, match="No space left"), IndexedWriter(tmp_path / "c", 10) as writer:
        writer._file.close()
        writer._file = Full()
        writer.add_document([1])
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken_by_a_folder(tmp_path):
    (tmp_path / "c.bin").mkdir()
    with pytest.raises(DataError, match="cannot write"):
        write(tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c.bin"]
