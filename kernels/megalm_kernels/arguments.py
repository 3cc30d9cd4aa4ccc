"""What the public functions say about wrong arguments: the operation, the argument, what it is, what is wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def refuse(operation: str, argument: str, got: object, wanted: object) -> ValueError:
    """The error to raise."""
    return ValueError(f"{operation}: {argument} is {got}, wanted {wanted}")


def check_shape(operation: str, argument: str, x: Tensor, shape: Sequence[int]) -> None:
    """Raises ValueError unless x has exactly this shape."""
    if tuple(x.shape) != tuple(shape):
        raise refuse(operation, f"the shape of {argument}", tuple(x.shape), tuple(shape))


def check_dtype(operation: str, argument: str, x: Tensor, allowed: Sequence[torch.dtype] = FLOATS) -> None:
    """Raises ValueError unless x has one of these dtypes."""
    if x.dtype not in allowed:
        raise refuse(operation, f"the dtype of {argument}", x.dtype, " or ".join(str(dtype) for dtype in allowed))


def check_device(operation: str, argument: str, x: Tensor, like: Tensor) -> None:
    """Raises ValueError unless both tensors are on one device."""
    if x.device != like.device:
        raise refuse(operation, f"the device of {argument}", x.device, f"{like.device}, where the first argument is")


def check_probability(operation: str, argument: str, value: float) -> None:
    """Raises ValueError unless 0 <= value < 1."""
    if not 0.0 <= value < 1.0:
        raise refuse(operation, argument, value, "at least 0 and less than 1")
