"""The microbatches of one data-parallel rank, one optimizer step at a time.

A step takes `global_batch_size` samples, beginning with the number of samples consumed so far. Rank r of n takes the
r-th contiguous block of them and cuts it into microbatches, so that the global batch is the same on every layout and a
run resumes at any sample: the loader has no state.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from megalm.data.packing import GPTDataset


@dataclass(frozen=True)
class Batch:
    """One microbatch. tokens and labels are None where this rank does not read (middle stages of a pipeline)."""

    tokens: torch.Tensor | None  # (B, S) int64
    labels: torch.Tensor | None  # (B, S) int64, the token that follows; -100: not counted
    samples: torch.Tensor  # (B,) int64, global sample numbers

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; from pinned memory the copy does not stop the host."""
        move = lambda x: None if x is None else x.to(device, non_blocking=True)  # noqa: E731
        return Batch(move(self.tokens), move(self.labels), self.samples.to(device, non_blocking=True))


class Loader:
    """Microbatches of rank `data_rank` of `data_size`; the next step is read in the background.

    global_batch_size must be a multiple of micro_batch_size * data_size.
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
    ):
        assert global_batch_size % (micro_batch_size * data_size) == 0, "checked by the configuration"
        assert 0 <= data_rank < data_size
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.samples_per_rank = global_batch_size // data_size
        self.data_rank = data_rank
        self.reads, self.pinned = reads, pinned  # pinned memory copies to a GPU without stopping the host
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
        samples = torch.from_numpy(numbers)
        if not self.reads:
            return Batch(None, None, samples)
        rows = torch.from_numpy(self.dataset.samples(numbers))  # (B, S + 1)
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        return Batch(tokens.pin_memory(), labels.pin_memory(), samples) if self.pinned else Batch(tokens, labels, samples)
