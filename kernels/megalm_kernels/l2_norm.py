"""The L2 norm of all elements of several tensors, for clipping: sqrt(sum of x^2), in fp32, with no wait for the device.

Bytes moved: each element once. The order of the additions is fixed by the sizes, so the same numbers give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalm_kernels.arguments import check_device, check_dtype, refuse
from megalm_kernels.dispatch import implementation, kernel_op, register, triton_obstacle

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def l2_norm(tensors: Tensor | Sequence[Tensor]) -> Tensor:
    """The norm over every element of one tensor or of a list of them; an fp32 scalar on their device, without a gradient.

    fp32, bf16 or fp16, of any shapes; summed in fp32, so above 1.8e19 it is inf. Raises ValueError for an empty list, another
    dtype, or more than one device.
    """
    several = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if not several:
        raise refuse("l2_norm", "tensors", "empty", "at least one tensor")
    for i, x in enumerate(several):
        check_dtype("l2_norm", f"tensors[{i}]", x, _FLOATS)
        check_device("l2_norm", f"tensors[{i}]", x, several[0])
    return implementation("l2_norm")([x.detach() for x in several])


def l2_norm_reference(tensors: Sequence[Tensor]) -> Tensor:
    """The formula, in fp32, or in fp64 where that is given."""
    squares = [x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).square().sum() for x in tensors]
    return torch.stack(squares).sum().sqrt()


def _l2_norm_torch(tensors: list[Tensor]) -> Tensor:
    """torch's norm of each tensor, then of the norms."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) for x in tensors]))


@kernel_op("l2_norm", "l2_norm:l2_norm")
def _l2_norm_op(tensors: list[Tensor]) -> Tensor:
    return _l2_norm_torch(tensors)


@_l2_norm_op.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float32)


def _l2_norm_triton(tensors: list[Tensor]) -> Tensor:
    return _l2_norm_op([x if x.is_contiguous() else x.contiguous() for x in tensors])


register("l2_norm", "torch", _l2_norm_torch)
register("l2_norm", "triton", _l2_norm_triton, triton_obstacle)
