"""Weight gradients that wait: behind a collective of the same backward, or for the schedule's W action.

A linear layer's backward has two halves. The input gradient is what the layer before waits for; the weight gradient is
waited for by nobody until the step. One queue serves both uses of that: with `overlap`, the half that waits is computed
while the ranks sum the input gradient (f's backward, `enter_region`); between `hold` and `take`, it is handed to the
executor, which computes it where its rank would otherwise wait (Qi et al. 2023). It needs activations and output
gradients, not the weight's values, so ZeRO-3 may have released those in the meantime.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalm_kernels.linear import weight_gradient

Waiting = list[tuple[Sequence[Tensor], Tensor, Tensor]]  # weights, layer input, gradient of the layer's output


class WeightGradients:
    """The queue of one rank, shared by its linear layers."""

    def __init__(self, overlap: bool = False):
        self.overlap, self._held = overlap, False
        self._waiting: Waiting = []

    @property
    def holds(self) -> bool:
        """Whether a backward leaves its weight gradients here; else it computes them at once."""
        return self.overlap or self._held

    def add(self, weights: Sequence[Tensor], x: Tensor, dy: Tensor) -> None:
        """Leave work: dW of the weights, joined along dim 0, is dy^T x."""
        self._waiting.append((weights, x, dy))

    def hold(self) -> None:
        """From here on gradients wait until `take`."""
        self._held = True

    def take(self) -> Waiting:
        """What has been left since `hold`."""
        self._held = False
        waiting, self._waiting = self._waiting, []
        return waiting

    def run_behind_collective(self) -> None:
        """Compute what waits, unless it is held for the executor."""
        if not self._held:
            compute(self.take())


@torch.no_grad()
def compute(waiting: Waiting) -> None:
    """Compute weight gradients and add them up on the parameters."""
    for weights, x, dy in waiting:
        if len(weights) == 1 and (sum_so_far := weights[0].grad) is not None and sum_so_far.dtype == x.dtype:
            sum_so_far.addmm_(dy.flatten(0, -2).t(), x.flatten(0, -2))  # no product of its own in memory
            continue
        gradient = weight_gradient(x, dy)
        sizes = [getattr(weight, "ds_shape", weight.shape)[0] for weight in weights]  # ds_shape: released by ZeRO-3
        for weight, part in zip(weights, gradient.split(sizes), strict=True):
            accumulate(weight, part)


def accumulate(weight: Tensor, gradient: Tensor) -> None:
    """Add to `weight.grad` as autograd would: in the dtype that the parameter asks for (`grad_dtype`), without hooks."""
    if weight.grad is not None:
        weight.grad.add_(gradient)
        return
    dtype = weight.grad_dtype or weight.dtype
    data = weight.data
    if data.shape != gradient.shape:  # torch compares the shapes when a gradient is set: show it the right one for a moment
        weight.data = data.new_empty(1).expand(gradient.shape)
    weight.grad = gradient.to(dtype, copy=True)
    weight.data = data
