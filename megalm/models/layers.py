"""The small parts of a block: norms, dropout, position embedding, MLPs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.models.dropout import keep_mask
from megalm_kernels import swiglu
from megalm_kernels.linear import linears


class FusesProjections(nn.Module):
    """A module with several projections of one input, which may run as one matrix product. The run sets `fuse`."""

    fuse: bool = False


def project_together(x: Tensor, projections: tuple[nn.Module, ...], fuse: bool) -> tuple[Tensor, ...]:
    """Linear layers of one input, as one matrix product where `fuse` says so. x (..., E) -> one (..., F_i) each."""
    if not fuse:
        return tuple(project(x) for project in projections)
    weights, biases = [p.weight for p in projections], [p.bias for p in projections]
    return linears(x, weights, biases, getattr(projections[0], "queue", None))  # type: ignore[arg-type]


class OnSequenceSlice(nn.Module):
    """A module that may see only a slice of the sequence, and must know which: slice `index` of `count` equal ones."""

    sequence_slice: tuple[int, int] = (0, 1)

    def local(self, positions: Tensor) -> Tensor:
        """The positions of this module's slice. positions (..., S) -> (..., S / count)."""
        index, count = self.sequence_slice
        return positions.chunk(count, -1)[index]


class PositionEmbedding(OnSequenceSlice):
    """Learned position vectors. positions (S,) or (B, S) int64 -> (S, E) or (B, S, E)."""

    def __init__(self, num_positions: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_positions, size))

    def forward(self, positions: Tensor) -> Tensor:
        return F.embedding(self.local(positions), self.weight)


class Dropout(OnSequenceSlice):
    """Dropout whose mask is a function of (seed, site, sample, position, channel): the same on every layout.

    `site` tells the places in the model apart; `seed` is set by the run. x (B, S, E).
    """

    def __init__(self, probability: float, site: int):
        super().__init__()
        self.probability, self.site, self.seed = probability, site, 0

    def forward(self, x: Tensor, samples: Tensor | None, positions: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        assert samples is not None, "dropout needs the samples' numbers"
        keep = keep_mask(self.seed, self.site, samples, self.local(positions), x.shape[-1], self.probability)
        return x * keep * (1.0 / (1.0 - self.probability))


class GeluMLP(nn.Module):
    """down(gelu(up(x))), with biases. x (B, S, E)."""

    def __init__(self, size: int, inner: int):
        super().__init__()
        self.up = nn.Linear(size, inner)
        self.down = nn.Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwigluMLP(FusesProjections):
    """down(silu(gate(x)) * up(x)), without biases. x (B, S, E)."""

    def __init__(self, size: int, inner: int):
        super().__init__()
        self.gate = nn.Linear(size, inner, bias=False)
        self.up = nn.Linear(size, inner, bias=False)
        self.down = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(*project_together(x, (self.gate, self.up), self.fuse)))
