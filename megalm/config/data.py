"""Where the tokens come from and how they are cut into samples."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.knobs import knob


@dataclass
class DataConfig:
    """The tokens to train on."""

    path: str = knob(
        "data/stdlib/corpus",
        "prefix of the indexed tokens: PATH.bin and PATH.idx, as `megalm prepare` or Megatron writes them",
    )
    tokenizer: str = knob("", "tokenizer.json; empty: the one beside the tokens, if there is one")
    seq_length: int = knob(128, "tokens in one sample (S)", minimum=1)
    document_mask: bool = knob(
        False, "documents packed into one sample do not see each other: attention stays in a document, positions start anew"
    )
    split: str = knob("0.98,0.02,0", "shares of the documents for training, validation and test")
    fold: int = knob(
        -1,
        "cross-validation: the part of the documents, counted from 0, that validates while the others train; -1: none",
        minimum=-1,
    )
    num_folds: int = knob(5, "equal parts that data.fold counts; data.split then only says what is left for testing", minimum=2)
    seed: int = knob(1234, "order of documents and samples", minimum=0)


@dataclass
class PrepareConfig:
    """Turn text into indexed tokens and a tokenizer."""

    source: str = knob(
        "stdlib",
        "`stdlib` (the Python standard library's own sources), or a file or folder of .txt, .md, .py or .jsonl",
    )
    output: str = knob("data/stdlib", "folder for tokenizer.json, corpus.bin, corpus.idx and manifest.json")
    vocab_size: int = knob(2048, "tokens of the byte-level BPE that is trained here", minimum=258)
    tokenizer: str = knob("", "an existing tokenizer.json to use; empty: train one on the corpus")
    json_key: str = knob("text", "field that holds the text in .jsonl files")
    overwrite: bool = knob(False, "make it anew, also where the output holds a corpus of other inputs or settings")
