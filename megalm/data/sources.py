"""Documents of a source of raw text, in an order that depends on file names only.

`stdlib` is the Python standard library's own sources without its tests (11 MB, always there, nothing to download); any
other source is a file or a folder. A .jsonl file holds one document per line, every other file is one document.
Documents that are not UTF-8 are skipped and counted, and so are blank ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megalm.config.data import PrepareConfig
from megalm.data.indexed import data_error, file_errors
from megalm.errors import DataError, Problem

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
STDLIB_SKIPS = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"})
SKIP_REASONS = ("not UTF-8", "blank")


@dataclass
class Source:
    """Files in order. What the last pass of `documents` left out: `skipped` counts it by reason."""

    root: Path
    files: list[Path]
    json_key: str
    ignored: int = 0  # files of other kinds beside them
    skipped: dict[str, int] = field(default_factory=dict)
    not_utf8: Path | None = None  # the first file with text of that kind

    def sha256(self) -> str:
        """One hash over the names and contents of all files."""
        total = hashlib.sha256()
        for path in self.files:
            total.update(f"{path.relative_to(self.root).as_posix()}\0{file_sha256(path)}\n".encode())
        return total.hexdigest()

    def num_bytes(self) -> int:
        """Bytes of all files on disk."""
        return sum(path.stat().st_size for path in self.files)

    def documents(self) -> Iterator[str]:
        """The text of every document that is not skipped."""
        self.skipped, self.not_utf8 = dict.fromkeys(SKIP_REASONS, 0), None
        for path in self.files:
            read = self._json_lines(path) if path.suffix == ".jsonl" else self._whole(path)
            for text in read:
                if text is None:
                    self.skipped["not UTF-8"] += 1
                    self.not_utf8 = self.not_utf8 or path
                elif not text.strip():
                    self.skipped["blank"] += 1
                else:
                    yield text

    def _whole(self, path: Path) -> Iterator[str | None]:
        with file_errors(path, "read"):
            raw = path.read_bytes()
        yield _decoded(raw)

    def _json_lines(self, path: Path) -> Iterator[str | None]:
        with file_errors(path, "read"), open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    line = _decoded(raw)
                    yield None if line is None else self._text_of(line, f"{path}:{number}")

    def _text_of(self, line: str, place: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise data_error(place, f"not a JSON object: {error}", fix="mend or remove this line") from error
        if not isinstance(record, dict) or not isinstance(record.get(self.json_key), str):
            has = ", ".join(k for k, v in record.items() if isinstance(v, str)) if isinstance(record, dict) else ""
            rule = f"no text under the key '{self.json_key}'"
            fix = "set prepare.json_key to the field with the text"
            raise data_error(place, rule, value=line.strip()[:60], allowed=has, fix=fix)
        return _without_lone_surrogates(record[self.json_key])


def open_source(config: PrepareConfig) -> Source:
    """Find the files of `config.source`. DataError if it is missing or has no file of a known kind."""
    if config.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        there = [path for path in _files_below(root, STDLIB_SKIPS) if path.suffix == ".py"]
    else:
        root = Path(config.source).expanduser()
        there = [root] if root.is_file() else _files_below(root, frozenset())
        root = root.parent if root.is_file() else root
    files = [path for path in there if path.name.endswith(SUFFIXES)]
    if not files:
        raise _source_error(config.source)
    return Source(root, files, config.json_key, ignored=len(there) - len(files))


def file_sha256(path: Path) -> str:
    """Hash of one file's content, as hex."""
    digest = hashlib.sha256()
    with file_errors(path, "read"), open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _files_below(root: Path, skips: frozenset[str]) -> list[Path]:
    """All files that are not hidden, sorted by path; hidden folders, `__pycache__` and `skips` are left out."""
    found: list[Path] = []
    with file_errors(root, "list"):
        for folder, folders, names in os.walk(root, onerror=_raise):
            folders[:] = [name for name in folders if name not in skips and name != "__pycache__" and name[0] != "."]
            found += [Path(folder, name) for name in names if name[0] != "."]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _raise(error: OSError) -> None:
    """os.walk passes over a folder that it may not read, unless told otherwise."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _source_error(source: str) -> DataError:
    path = Path(source).expanduser()
    rule = "the folder holds no file of a known kind" if path.is_dir() else "no such file or folder"
    fix = "prepare.source=stdlib"
    if path.is_file():
        rule, fix = "a file of unknown kind", f"rename it to {path.name}.txt if it is text"
    allowed = f"stdlib, or a file or folder of {', '.join(SUFFIXES)}"
    return DataError(Problem("prepare.source", source, rule, allowed, fix))


def _decoded(raw: bytes) -> str | None:
    """Text of UTF-8 bytes without a byte order mark; None if they are not UTF-8."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _without_lone_surrogates(text: str) -> str:
    """JSON may escape half a surrogate pair, which is no character and which no encoder takes."""
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text
