"""The microbatches of one data-parallel rank, one optimizer step at a time.

A step takes `global_batch_size` samples, beginning with the number of samples consumed so far. Rank r of n takes the
r-th contiguous block of them and cuts it into microbatches, so that the global batch is the same on every layout and a
run resumes at any sample: the loader has no state. Under context parallelism a rank gets some of a sample's tokens.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from megalm.data.documents import Documents, build_documents
from megalm.data.packing import GPTDataset
from megalm_kernels.cross_entropy import IGNORE


@dataclass(frozen=True)
class Batch:
    """One microbatch. tokens and labels are None where this rank does not read (middle stages of a pipeline)."""

    tokens: torch.Tensor | None  # (B, S) int64
    labels: torch.Tensor | None  # (B, S) int64, the token that follows; -100: not counted
    samples: torch.Tensor  # (B,) int64, global sample numbers
    documents: Documents | None = None  # None: attention does not stop at the end of a document

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; from pinned memory the copy does not stop the host."""
        move = lambda x: None if x is None else x.to(device, non_blocking=True)  # noqa: E731
        documents = None if self.documents is None else self.documents.to(device)
        return Batch(move(self.tokens), move(self.labels), self.samples.to(device, non_blocking=True), documents)


class Loader:
    """Microbatches of rank `data_rank` of `data_size`; the next step is read in the background.

    global_batch_size must be a multiple of micro_batch_size * data_size. places (S',): the tokens of a sample that this rank has;
    None: all of them. document_mask: batches tell where documents begin, and a document's last token has no label.
    """

    def __init__(
        self,
        dataset: GPTDataset,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        reads: bool = True,
        pinned: bool = False,
        places: np.ndarray | None = None,
        document_mask: bool = False,
    ):
        assert global_batch_size % (micro_batch_size * data_size) == 0, "checked by the configuration"
        assert 0 <= data_rank < data_size
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.samples_per_rank = global_batch_size // data_size
        self.data_rank = data_rank
        self.reads, self.pinned = reads, pinned  # pinned memory copies to a GPU without stopping the host
        self.places, self.document_mask = places, document_mask
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megalm-loader")
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def step(self, consumed: int) -> list[Batch]:
        """This rank's microbatches of the step that begins at global sample number `consumed` >= 0."""
        ahead, self._next = self._next, None
        batches = ahead[1].result() if ahead and ahead[0] == consumed else self.read(consumed)
        if self.reads:
            following = consumed + self.global_batch_size
            self._next = following, self._reader.submit(self.read, following)
        return batches

    def close(self) -> None:
        """End the background thread; `step` must not be called again."""
        self._reader.shutdown(cancel_futures=True)

    def read(self, consumed: int) -> list[Batch]:
        """The same, without reading ahead."""
        first = consumed + self.data_rank * self.samples_per_rank
        numbers = np.arange(first, first + self.samples_per_rank, dtype=np.int64)
        return [self._batch(part) for part in numbers.reshape(-1, self.micro_batch_size)]

    def _batch(self, numbers: np.ndarray) -> Batch:
        samples, documents = torch.from_numpy(numbers), None
        if self.document_mask:
            starts = [self.dataset.document_starts(number) for number in numbers.tolist()]
            documents = build_documents(starts, self.dataset.seq_length, self.places)
        if not self.reads:
            return Batch(None, None, samples, documents)
        rows = torch.from_numpy(self.dataset.samples(numbers))  # (B, S + 1)
        tokens, labels = rows[:, :-1], rows[:, 1:]
        if documents is not None:
            labels = labels.clone()
            for row, begins in zip(labels, documents.starts, strict=True):
                row[[start - 1 for start in begins[1:]]] = IGNORE
        if self.places is not None:
            tokens, labels = tokens[:, self.places], labels[:, self.places]
        tokens, labels = tokens.contiguous(), labels.contiguous()
        if self.pinned:
            tokens, labels = tokens.pin_memory(), labels.pin_memory()
        return Batch(tokens, labels, samples, documents)
