"""A corpus opened for a run: its splits, its tokenizer, and what is known of its tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalm.config.data import DataConfig
from megalm.config.fields import assign
from megalm.config.run import RunConfig
from megalm.data.indexed import IndexedDataset, data_error
from megalm.data.packing import SPLITS, GPTDataset, fold_documents, parse_split, split_documents
from megalm.data.sources import file_sha256
from megalm.data.tokenize import TOKENIZER, entropy, read_manifest
from megalm.data.tokenizer import Tokenizer
from megalm.errors import DataError, Problem

SCAN_CHUNK = 1 << 24  # tokens counted at a time


@dataclass(frozen=True)
class Corpus:
    """valid and test are None where their share is 0 or nothing evaluates; tokenizer where there is no tokenizer.json.

    vocab_size: every token id is below it. unigram_entropy: nats per token of the whole corpus; None where it is not
    known, which is for tokens that `megalm prepare` did not make but whose tokenizer is here.
    """

    config: DataConfig
    indexed: IndexedDataset
    train: GPTDataset
    valid: GPTDataset | None
    test: GPTDataset | None
    tokenizer: Tokenizer | None
    vocab_size: int
    unigram_entropy: float | None

    def fingerprint(self) -> str:
        """Hex sha256 of everything that decides what sample n is; a checkpoint stores it, a resumed run compares it."""
        parts: dict[str, Any] = {
            "idx": file_sha256(self.indexed.idx_path),
            "bin_bytes": self.indexed.bin_path.stat().st_size,
            "split": [round(share, 9) for share in parse_split(self.config.split)],
            "seed": self.config.seed,
            "seq_length": self.config.seq_length,
        }
        if self.config.fold >= 0:
            parts["fold"] = [self.config.fold, self.config.num_folds]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def corpus_of(config: RunConfig) -> Corpus:
    """The corpus of a run; raises what `open_corpus` raises."""
    evaluates = bool(config.train.eval_every)
    return open_corpus(config.data, config.model.vocab_size, evaluates, config.parallel.tensor_parallel)


def open_corpus(config: DataConfig, model_vocab_size: int, evaluates: bool = True, multiple_of: int = 1) -> Corpus:
    """Open the tokens at `config.path`, check that the model's embedding has a row for each id, and cut the splits.

    evaluates: the run has a use for validation and test. multiple_of: what the rows of the embedding are shared out to.
    Raises DataError for missing or damaged files, ids >= model_vocab_size, a tokenizer of another corpus, or a split
    with a share and a use but less than one sample.
    """
    indexed = IndexedDataset(config.path)
    tokenizer = _find_tokenizer(config, indexed)
    vocab_size, nats = _vocabulary(indexed, tokenizer)
    if vocab_size > model_vocab_size:
        rule = f"{config.path} holds token ids up to {vocab_size - 1}, and the model has no embedding for them"
        fix = f"model.vocab_size={-(-vocab_size // multiple_of) * multiple_of}"
        raise DataError(Problem("model.vocab_size", model_vocab_size, rule, f">= {vocab_size}", fix))
    datasets = _cut_splits(config, indexed, evaluates)
    train = datasets["train"]
    assert train is not None
    return Corpus(config, indexed, train, datasets["valid"], datasets["test"], tokenizer, vocab_size, nats)


def _cut_splits(config: DataConfig, indexed: IndexedDataset, evaluates: bool) -> dict[str, GPTDataset | None]:
    """A data set for the training split, always, and for each other split that has a share and a use."""
    shares = dict(zip(SPLITS, parse_split(config.split), strict=True))
    without_test = assign("data.split", ",".join([*config.split.split(",")[:2], "0"]))
    remedies = {"train": "", "valid": "train.eval_every=0", "test": without_test}
    dealt = split_documents(indexed, config.split, config.seed)
    if config.fold >= 0:
        dealt = fold_documents(indexed, config.split, config.seed, config.fold, config.num_folds)
        shares["valid"], remedies["valid"] = 1 / config.num_folds, "data.num_folds=2"
    return {
        name: GPTDataset(indexed, config.seq_length, documents, config.seed, name, remedies[name])
        if name == "train" or (evaluates and shares[name] > 0)
        else None
        for name, documents in dealt.items()
    }


def _find_tokenizer(config: DataConfig, indexed: IndexedDataset) -> Tokenizer | None:
    """The one that is named, else the one beside the tokens, else none."""
    if config.tokenizer:
        return Tokenizer.load(config.tokenizer, "data.tokenizer")
    beside = indexed.bin_path.parent / TOKENIZER
    return Tokenizer.load(beside) if beside.is_file() else None


def _vocabulary(indexed: IndexedDataset, tokenizer: Tokenizer | None) -> tuple[int, float | None]:
    """Vocabulary size and unigram entropy: from the manifest, else from the tokenizer, else from the tokens, once."""
    manifest = _manifest_of(indexed)
    if manifest:
        vocab_size, nats = int(manifest["vocab_size"]), float(manifest["unigram_entropy_nats"])
    elif tokenizer:
        return tokenizer.vocab_size, None
    else:
        counts = _count_tokens(indexed)
        vocab_size, nats = len(counts), entropy(counts)
    if tokenizer and tokenizer.vocab_size < vocab_size:
        rule = f"the tokenizer has {tokenizer.vocab_size} tokens, the corpus was made with {vocab_size}"
        raise data_error(indexed.bin_path, rule, fix="set data.tokenizer to the tokenizer.json that made the corpus")
    return vocab_size, nats


def _manifest_of(indexed: IndexedDataset) -> dict[str, Any]:
    """The manifest beside the tokens if it speaks of these tokens; the folder may hold those of others too."""
    folder = indexed.bin_path.parent
    manifest = read_manifest(folder)
    if indexed.bin_path.name not in manifest.get("files", {}):
        return {}
    if manifest["tokens"] != indexed.num_tokens:
        rule = "the manifest is of another corpus than the tokens beside it"
        allowed = f"{manifest['tokens']} tokens, as the manifest says"
        raise data_error(indexed.bin_path, rule, value=f"{indexed.num_tokens} tokens", allowed=allowed)
    return manifest


def _count_tokens(indexed: IndexedDataset) -> np.ndarray:
    """How often each id occurs, (highest id + 1,) int64; reads all tokens."""
    counts = np.zeros(0, np.int64)
    for start in range(0, indexed.num_tokens, SCAN_CHUNK):
        chunk = indexed.tokens[start : start + SCAN_CHUNK]
        if chunk.min() < 0:
            raise data_error(indexed.bin_path, "a token id is negative", value=int(chunk.min()), allowed=">= 0")
        found = np.bincount(chunk, minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    return counts
