"""Token documents on disk, byte-compatible with Megatron's `.bin` and `.idx` pair.

`PREFIX.bin` holds the token ids of all sequences, one after the other, with no header and no padding.
`PREFIX.idx` is little endian:

    9 bytes  `MMIDIDX\\0\\0`
    u64      version, 1
    u8       code of the token type, see `DTYPES`
    u64      S, number of sequences
    u64      D, number of document bounds = documents + 1
    i32[S]   tokens of each sequence
    i64[S]   byte offset of each sequence in `.bin`
    i64[D]   number of the first sequence of each document; the last one is S

Here a document is one sequence. Files with several sequences (sentences) per document are read as documents too:
their sequences lie next to each other, so a document is one slice of the memory map.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megalm.config.fields import assign
from megalm.errors import DataError, Problem

CORPUS = "corpus"  # what `megalm prepare` calls the pair in its output folder
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, sequences, document bounds
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # 6 and 7 are floats
MAX_SEQUENCE = 2**31 - 1  # lengths are i32
REMAKE = "make it anew with `megalm prepare`, or copy it again"
FILL = "give `megalm prepare` a source with text in it"


def pair_of(prefix: str | Path) -> tuple[Path, Path]:
    """The `.bin` and `.idx` paths of a prefix; a prefix may itself contain dots."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's choice: two bytes per token below 65,500 ids, else four."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def data_error(path: str | Path, rule: str, *, value: object = None, allowed: str = "", fix: str = REMAKE) -> DataError:
    """An error about one file."""
    return DataError(Problem(str(path), value, rule, allowed, fix))


@contextmanager
def file_errors(path: Path, action: str, key: str = "") -> Iterator[None]:
    """Turn a refusal of the operating system (no permission, disk full) into a DataError; `key` is what set the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        fix = "choose another path, or mend its permissions or free space"
        raise data_error(key or path, f"cannot {action}: {reason}", value=path if key else None, fix=fix) from error


def check_exists(path: Path, fix: str, key: str = "") -> None:
    """Raise DataError unless `path` is a file; `key` is what set the path."""
    with file_errors(path, "read", key):
        if not path.is_file():
            raise data_error(key or path, "the file does not exist", value=path if key else None, fix=fix)


def check_pair(prefix: str | Path) -> None:
    """Raise DataError unless both files of a prefix are there; the fix is the prefix that was probably meant."""
    for path in pair_of(prefix):
        with file_errors(path, "read"):
            if path.is_file():
                continue
        rule, fix = f"{path} does not exist", "make it with `megalm prepare`, or set data.path to another prefix"
        if Path(prefix, f"{CORPUS}.bin").is_file():
            rule, fix = "a folder, and not the prefix of the two files in it", assign("data.path", f"{Path(prefix, CORPUS)}")
        elif Path(prefix).suffix in (".bin", ".idx"):
            rule, fix = "a prefix has no .bin or .idx at its end", assign("data.path", f"{Path(prefix).with_suffix('')}")
        raise data_error("data.path", rule, value=prefix, fix=fix)


class IndexedWriter:
    """Streams documents into `prefix.bin` and `prefix.idx`.

    A context manager: both files appear, complete, when the block ends well; on any error nothing is left behind.
    Raises DataError for an id outside [0, vocab_size), an empty or too long document, no document at all, or a path
    that cannot be written.
    """

    def __init__(self, prefix: str | Path, vocab_size: int):
        self.bin_path, self.idx_path = pair_of(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.lengths = array("i")
        self._bin_part, self._idx_part = (p.with_name(f".{p.name}.{os.getpid()}.part") for p in pair_of(prefix))
        self._file: BinaryIO | None = None

    def __enter__(self) -> IndexedWriter:
        with file_errors(self.bin_path, "write"):
            self.bin_path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._bin_part, "wb")
        return self

    def add_document(self, ids: Any) -> None:
        """Append one document: a sequence of int, or an integer array (n,)."""
        tokens = np.asarray(ids)
        self._check_document(tokens)
        assert self._file is not None, "add_document outside the with block"
        with file_errors(self.bin_path, "write"):
            self._file.write(tokens.astype(self.dtype).tobytes())
        self.lengths.append(tokens.size)

    def _check_document(self, tokens: np.ndarray) -> None:
        number = len(self.lengths)
        if not 1 <= tokens.size <= MAX_SEQUENCE:
            rule, allowed = f"document {number} has a length that the index cannot hold", f"1..{MAX_SEQUENCE} tokens"
            raise data_error(self.bin_path, rule, value=tokens.size, allowed=allowed, fix="split or drop it")
        assert tokens.dtype.kind in "iu", "token ids are integers"
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            rule, allowed = f"document {number} has a token id outside the vocabulary", f"0..{self.vocab_size - 1}"
            fix = "use the tokenizer that made the ids"
            raise data_error(self.bin_path, rule, value=low if low < 0 else high, allowed=allowed, fix=fix)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            assert self._file is not None
            with file_errors(self.bin_path, "write"):
                self._file.close()
            if kind is None:
                self._finish()
        finally:
            self._bin_part.unlink(missing_ok=True)
            self._idx_part.unlink(missing_ok=True)

    def _finish(self) -> None:
        if not self.lengths:
            raise data_error(self.bin_path, "there is no document to write", fix=FILL)
        with file_errors(self.idx_path, "write"):
            self._idx_part.write_bytes(_index_bytes(np.frombuffer(self.lengths, np.int32), self.dtype))
            self.idx_path.unlink(missing_ok=True)  # an interruption here leaves no index, never that of other tokens
            os.replace(self._bin_part, self.bin_path)
            os.replace(self._idx_part, self.idx_path)


def _index_bytes(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """The whole `.idx` of documents of one sequence each; lengths (S,) int32."""
    code = next(code for code, kind in DTYPES.items() if kind == dtype)
    offsets = np.zeros(len(lengths), "<i8")
    np.cumsum(lengths[:-1], out=offsets[1:])
    bounds = np.arange(len(lengths) + 1, dtype="<i8")
    header = HEADER.pack(MAGIC, VERSION, code, len(lengths), len(bounds))
    return b"".join([header, lengths.astype("<i4").tobytes(), (offsets * dtype.itemsize).tobytes(), bounds.tobytes()])


class IndexedDataset:
    """Reads `prefix.bin` and `prefix.idx` through a memory map.

    tokens (num_tokens,) and what `document` and `read` return are views of the file in its own integer type.
    document_starts, document_lengths: (num_documents,) int64, in tokens. Raises DataError for every kind of damage.
    """

    def __init__(self, prefix: str | Path):
        self.bin_path, self.idx_path = pair_of(prefix)
        check_pair(prefix)
        dtype, lengths, offsets, bounds = _read_index(self.idx_path)
        ends = _check_offsets(self.idx_path, lengths, offsets, dtype.itemsize)
        self.num_tokens = int(ends[-1])
        _check_tokens(self.bin_path, self.num_tokens * dtype.itemsize)
        _check_bounds(self.idx_path, bounds, len(lengths))
        edges = ends[bounds]
        self.document_starts = edges[:-1]
        self.document_lengths = np.diff(edges)
        self.num_documents = len(self.document_lengths)
        with file_errors(self.bin_path, "read"):
            self.tokens = np.asarray(np.memmap(self.bin_path, dtype, mode="r"))  # a plain view: slices cost a third

    def document(self, number: int) -> np.ndarray:
        """All tokens of a document, (length,)."""
        return self.read(number, 0, int(self.document_lengths[number]))

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """`length` tokens of a document from its token `offset` on. IndexError where the document does not reach."""
        size = int(self.document_lengths[document])
        if not 0 <= offset <= offset + length <= size:
            raise IndexError(f"document {document} has {size} tokens, not {offset}..{offset + length}")
        start = int(self.document_starts[document]) + offset
        return self.tokens[start : start + length]


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Token type, sequence lengths (S,), byte offsets (S,) and document bounds (D,)."""
    with file_errors(path, "read"):
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise data_error(path, "not an index file: it does not begin with MMIDIDX", value=bytes(header[:9]))
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != VERSION:
        raise data_error(path, "unknown version of the index format", value=version, allowed=str(VERSION))
    if code not in DTYPES:
        allowed = ", ".join(f"{code} {np.dtype(kind).name}" for code, kind in DTYPES.items())
        raise data_error(path, "the code of the token type is no integer type", value=code, allowed=allowed)
    expected = HEADER.size + 12 * sequences + 8 * documents
    if size != expected:
        rule = f"an index of {sequences} sequences and {documents} document bounds has another size"
        raise data_error(path, rule, value=f"{size} bytes", allowed=f"{expected} bytes")
    if sequences == 0 or documents < 2:
        raise data_error(path, "the corpus is empty", value=f"{sequences} sequences", fix=FILL)
    raw = np.asarray(np.memmap(path, np.uint8, mode="r"))
    lengths, offsets, bounds = np.split(raw[HEADER.size :], (4 * sequences, 12 * sequences))
    return np.dtype(DTYPES[code]), lengths.view("<i4"), offsets.view("<i8"), bounds.view("<i8")


def _check_offsets(path: Path, lengths: np.ndarray, offsets: np.ndarray, itemsize: int) -> np.ndarray:
    """Sequences must follow each other without gap or overlap; returns their edges in tokens, (S+1,) int64."""
    if lengths.min() < 0:
        raise data_error(path, "a sequence has a negative length", value=int(lengths.min()))
    edges = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=edges[1:])
    wrong = np.flatnonzero(offsets != edges[:-1] * itemsize)
    if len(wrong):
        first = int(wrong[0])
        rule = f"offsets must increase: sequence {first} does not begin where the one before it ends"
        raise data_error(path, rule, value=f"byte {offsets[first]}", allowed=f"byte {edges[first] * itemsize}")
    if edges[-1] == 0:
        raise data_error(path, "the corpus is empty", value="0 tokens", fix=FILL)
    return edges


def _check_tokens(path: Path, expected: int) -> None:
    size = path.stat().st_size
    if size != expected:
        state = "truncated" if size < expected else "longer than its index says"
        raise data_error(path, f"the token file is {state}", value=f"{size} bytes", allowed=f"{expected} bytes")


def _check_bounds(path: Path, bounds: np.ndarray, sequences: int) -> None:
    if bounds[0] != 0 or bounds[-1] != sequences or np.any(np.diff(bounds) < 0):
        rule = "document bounds must rise from 0 to the number of sequences"
        raise data_error(path, rule, value=f"{bounds[0]}..{bounds[-1]}", allowed=f"0..{sequences}")
