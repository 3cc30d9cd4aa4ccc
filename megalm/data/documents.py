"""The documents that are packed into the samples of a microbatch, for attention that stays inside a document."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where they begin. `starts` are of the whole samples on every rank; `positions` of the tokens that this rank has."""

    starts: tuple[tuple[int, ...], ...]  # by sample, rising; the first is 0
    positions: Tensor  # (B, S') int64, place of each token in its document
    seq_length: int  # S, of the whole samples
    cu_seqlens: Tensor  # (N + 1,) int32, where each document begins among the B * S tokens of the whole samples, and the end

    def to(self, device: torch.device) -> Documents:
        """The same on `device`."""
        positions, cu_seqlens = (x.to(device, non_blocking=True) for x in (self.positions, self.cu_seqlens))
        return replace(self, positions=positions, cu_seqlens=cu_seqlens)


def build_documents(starts: Sequence[Sequence[int]], seq_length: int, places: np.ndarray | None = None) -> Documents:
    """Documents of samples of `seq_length` tokens that begin at `starts`; places (S',): of the tokens of this rank, None: all."""
    ends = [[*sample[1:], seq_length] for sample in starts]
    lengths = [np.diff([0, *sample]) for sample in ends]
    whole = [np.arange(seq_length) - np.repeat(sample, length) for sample, length in zip(starts, lengths, strict=True)]
    positions = np.stack(whole) if places is None else np.stack(whole)[:, places]
    borders = itertools.accumulate(np.concatenate(lengths).tolist(), initial=0)
    cu_seqlens = torch.tensor(list(borders), dtype=torch.int32)
    return Documents(tuple(map(tuple, starts)), torch.from_numpy(positions), seq_length, cu_seqlens)
