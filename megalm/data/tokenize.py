"""Raw text to a corpus that can be trained on: tokenizer.json, corpus.bin, corpus.idx and manifest.json.

All four appear together at the end, the manifest last, or nothing does. A second run over the same inputs and settings
finds the manifest, checks every file against it and does nothing. A corpus of other inputs or settings is not replaced
unasked: runs that were trained on it need its tokenizer.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megalm import __version__
from megalm.config.data import DataConfig, PrepareConfig
from megalm.config.fields import assign
from megalm.config.model import ModelConfig
from megalm.data.indexed import CORPUS, IndexedWriter, data_error, file_errors
from megalm.data.sources import SUFFIXES, Source, file_sha256, open_source
from megalm.data.tokenizer import Tokenizer
from megalm.errors import DataError, Problem

TOKENIZER = "tokenizer.json"
MANIFEST = "manifest.json"
FILES = (TOKENIZER, f"{CORPUS}.bin", f"{CORPUS}.idx")
KEYS = ("source", "inputs_sha256", "tokens", "vocab_size", "unigram_entropy_nats", "files", "settings")  # of a manifest
RECIPE = 1  # raise it when the same inputs and settings would give other tokens
PIECE = 1 << 16  # characters that one core encodes at a time
BATCH = 1 << 22  # characters in flight: enough for all cores, small in memory


@dataclass(frozen=True)
class Summary:
    """What `prepare` made, or found: the manifest's numbers."""

    output: str
    source: str
    inputs_sha256: str
    documents: int
    tokens: int
    bytes: int  # of UTF-8 text
    vocab_size: int
    unigram_entropy_nats: float  # the loss of the best model that knows no context
    skipped: dict[str, int]  # documents left out, by reason
    notes: list[str] = field(default_factory=list)  # what may surprise
    files: dict[str, str] = field(default_factory=dict)  # name -> sha256
    seconds: float = 0.0
    reused: bool = False  # nothing was done: the output was complete

    def __str__(self) -> str:
        skipped = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items() if count)
        state = "already there, nothing to do" if self.reused else f"made in {self.seconds:.1f} s"
        return (
            f"corpus in {self.output}: {state}\n"
            f"  {self.documents:,} documents, {self.bytes:,} bytes, {self.tokens:,} tokens "
            f"({self.bytes / self.tokens:.2f} bytes per token), vocabulary {self.vocab_size:,}\n"
            f"  unigram entropy {self.unigram_entropy_nats:.4f} nats per token"
            + (f"\n  left out: {skipped} documents" if skipped else "")
            + "".join(f"\n  note: {note}" for note in self.notes)
            + f"\nnext: {self.next_command}"
        )

    @property
    def next_command(self) -> str:
        """Trains on the corpus: what differs from pretrain's defaults is named."""
        wanted = {"data.path": str(Path(self.output, CORPUS)), "model.vocab_size": self.vocab_size}
        defaults = {"data.path": DataConfig().path, "model.vocab_size": ModelConfig().vocab_size}
        changes = [assign(key, value) for key, value in wanted.items() if value != defaults[key]]
        return " ".join(["megalm pretrain", *changes])


def prepare(config: PrepareConfig) -> Summary:
    """Make the corpus that `config` describes, unless it is there.

    Raises DataError for a missing or unusable source, an empty corpus, a bad tokenizer, or an output that cannot be
    written or holds another corpus; the output folder is then as it was.
    """
    started = time.perf_counter()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    output = Path(config.output)
    source = open_source(config)
    inputs, settings = source.sha256(), _settings(config)
    manifest = {} if config.overwrite else read_manifest(output)
    if manifest:
        _check_same(manifest, config, inputs, settings)
        if _is_whole(output, manifest):
            return _found(output, manifest)
    with _staging(output) as folder:
        tokenizer = _make_tokenizer(config, source, folder)
        documents, counts, size = _encode(source, tokenizer, folder)
        summary = Summary(
            output=str(output),
            source=config.source,
            inputs_sha256=inputs,
            documents=documents,
            tokens=int(counts.sum()),
            bytes=size,
            vocab_size=tokenizer.vocab_size,
            unigram_entropy_nats=entropy(counts),
            skipped=source.skipped,
            notes=_notes(config, source, tokenizer.vocab_size),
            files={name: file_sha256(folder / name) for name in FILES},
            seconds=time.perf_counter() - started,
        )
        _write_manifest(folder / MANIFEST, summary, settings)
        _publish(folder, output)
    return summary


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution given by how often each token occurs, counts (V,)."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared corpus; empty if there is none. DataError if it is damaged."""
    path = folder / MANIFEST
    with file_errors(path, "read"):
        if not path.is_file():
            return {}
        raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
        complete = {*KEYS} <= manifest.keys()
    except (ValueError, AttributeError):
        complete = False
    if not complete:
        raise data_error(path, "not a manifest of `megalm prepare`", fix="make the corpus anew: prepare.overwrite=true")
    return manifest


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What decides the result besides the inputs."""
    if not config.tokenizer:
        return {"recipe": RECIPE, "json_key": config.json_key, "vocab_size": config.vocab_size}
    Tokenizer.load(config.tokenizer, "prepare.tokenizer")  # a bad one is refused before any work
    return {"recipe": RECIPE, "json_key": config.json_key, "tokenizer_sha256": file_sha256(Path(config.tokenizer))}


def _check_same(manifest: dict[str, Any], config: PrepareConfig, inputs: str, settings: dict[str, Any]) -> None:
    """Raise DataError if the corpus that is there was made of other inputs or with other settings."""
    old, new = (
        {
            "inputs": f"sha256 {sha256[:12]}",
            "vocabulary": made_with.get("vocab_size", "the tokenizer's"),
            "tokenizer": made_with.get("tokenizer_sha256", "trained here")[:12],
            "json_key": made_with.get("json_key"),
            "recipe": made_with.get("recipe"),
        }
        for sha256, made_with in ((manifest["inputs_sha256"], manifest["settings"]), (inputs, settings))
    )
    if old["inputs"] != new["inputs"]:  # the same text under another name is no other source
        old, new = {"source": manifest["source"], **old}, {"source": config.source, **new}
    differences = [f"{name} ({old[name]}, now {new[name]})" for name in old if old[name] != new[name]]
    if differences:
        rule = f"the folder holds a corpus with another {', '.join(differences)}; runs trained on it need its tokenizer"
        fix = "prepare.overwrite=true (or another prepare.output)"
        raise DataError(Problem("prepare.output", config.output, rule, "", fix))


def _is_whole(output: Path, manifest: dict[str, Any]) -> bool:
    """Every file is as the manifest says."""
    return manifest["files"] == {name: file_sha256(output / name) for name in FILES if (output / name).is_file()}


def _found(output: Path, manifest: dict[str, Any]) -> Summary:
    """The summary of a corpus that is there."""
    known = {name: manifest[name] for name in Summary.__dataclass_fields__ if name in manifest}
    return Summary(**{**known, "output": str(output), "reused": True})


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A hidden folder inside `output`, gone at the end; `output` too if it was made here and stays empty."""
    existed = output.exists()
    if existed and not output.is_dir():
        rule = "a file, and the corpus is written into a folder"
        raise DataError(Problem("prepare.output", output, rule, "", assign("prepare.output", f"{output}.corpus")))
    with file_errors(output, "write to the folder", "prepare.output"):
        output.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".prepare-", dir=output))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not existed and not any(output.iterdir()):
            output.rmdir()


def _make_tokenizer(config: PrepareConfig, source: Source, folder: Path) -> Tokenizer:
    if config.tokenizer:
        tokenizer = Tokenizer.load(config.tokenizer)
        with file_errors(folder / TOKENIZER, "write"):
            shutil.copyfile(config.tokenizer, folder / TOKENIZER)
        return tokenizer
    tokenizer = Tokenizer.train(_progress(source, "train tokenizer"), config.vocab_size)
    tokenizer.save(folder / TOKENIZER)
    return tokenizer


def _notes(config: PrepareConfig, source: Source, vocab_size: int) -> list[str]:
    """What the user may not expect of the corpus."""
    notes = []
    if config.tokenizer and vocab_size != config.vocab_size:
        notes.append(f"prepare.vocab_size={config.vocab_size} had no effect: prepare.tokenizer has its own vocabulary")
    elif vocab_size < config.vocab_size:
        notes.append(f"the vocabulary is smaller than prepare.vocab_size={config.vocab_size}: the text gives no more tokens")
    if source.ignored:
        notes.append(f"files of unknown kinds that were ignored: {source.ignored}; known are {', '.join(SUFFIXES)}")
    if source.not_utf8:
        notes.append(f"the first file that is not UTF-8 is {source.not_utf8}")
    return notes


def _progress(source: Source, title: str) -> Iterator[str]:
    """The source's documents, with a bar that counts their bytes; no bar where stderr is no terminal."""
    with tqdm(total=source.num_bytes(), desc=title, unit="B", unit_scale=True, disable=None) as bar:
        for text in source.documents():
            yield text
            bar.update(len(text))


def _encode(source: Source, tokenizer: Tokenizer, folder: Path) -> tuple[int, np.ndarray, int]:
    """Write corpus.bin and corpus.idx; returns documents, how often each token occurs (V,), and bytes of text."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    size = 0
    with IndexedWriter(folder / CORPUS, tokenizer.vocab_size) as writer:
        for batch in _batches(_progress(source, "encode"), tokenizer):
            pieces = [piece for document in batch for piece in document]
            size += sum(len(piece.encode()) for piece in pieces)
            encoded = iter(tokenizer.encode_batch(pieces))
            ended = [[*chain(*islice(encoded, len(document))), tokenizer.eod_id] for document in batch]
            arrays = [np.array(ids, np.int32) for ids in ended]
            for ids in arrays:
                writer.add_document(ids)
            counts += np.bincount(np.concatenate(arrays), minlength=len(counts))
        if not writer.lengths:
            raise _no_text(source)
    return len(writer.lengths), counts, size


def _no_text(source: Source) -> DataError:
    skipped = ", ".join(f"{count} {reason}" for reason, count in source.skipped.items())
    rule = f"the corpus is empty: no document with text in {len(source.files)} files ({skipped})"
    return DataError(Problem("prepare.source", source.root, rule, "at least one document", "prepare.source=stdlib"))


def _batches(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[list[str]]]:
    """Documents, each as its pieces, grouped to about BATCH characters."""
    batch: list[list[str]] = []
    size = 0
    for text in texts:
        batch.append(tokenizer.split_long(text, PIECE))
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_manifest(path: Path, summary: Summary, settings: dict[str, Any]) -> None:
    content = {"tool": f"megalm {__version__}", "settings": settings, **asdict(summary)}
    for name in ("output", "reused"):  # true of this run, not of the corpus
        del content[name]
    with file_errors(path, "write"):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _publish(folder: Path, output: Path) -> None:
    """Move the finished files into place. Without its manifest an interrupted output counts as not there."""
    with file_errors(output, "write to the folder"):
        (output / MANIFEST).unlink(missing_ok=True)
        (output / f"{CORPUS}.idx").unlink(missing_ok=True)
        for name in (*FILES, MANIFEST):
            os.replace(folder / name, output / name)
