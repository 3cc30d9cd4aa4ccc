"""What the public functions say about wrong arguments: the operation, the argument, what it is, what is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_KERNEL_FLOATS = FLOATS[:3]
_NUMBERS, _INTEGERS = (float, int, Real), (int, Integral)  # the usual types first: looking there takes no time


def refuse(operation: str, argument: str, got: object, wanted: object) -> ValueError:
    """The error to raise."""
    return ValueError(f"{operation}: {argument} is {got}, wanted {wanted}")


def kind_of(value: object) -> str:
    """What to call a value that is of the wrong kind altogether."""
    return "None" if value is None else f"of type {type(value).__name__}"


def check_shape(operation: str, argument: str, x: Tensor, shape: Sequence[int]) -> None:
    """Raises ValueError unless x has exactly this shape."""
    if tuple(x.shape) != tuple(shape):
        raise refuse(operation, f"the shape of {argument}", tuple(x.shape), tuple(shape))


def check_dtype(operation: str, argument: str, x: Tensor, allowed: Sequence[torch.dtype] = FLOATS) -> None:
    """Raises ValueError unless x is a tensor and has one of these dtypes: so this check comes before those of its shape."""
    if not isinstance(x, Tensor):
        raise refuse(operation, argument, kind_of(x), "a Tensor")
    if x.dtype not in allowed:
        raise refuse(operation, f"the dtype of {argument}", x.dtype, " or ".join(str(dtype) for dtype in allowed))


def check_kernel_dtype(operation: str, argument: str, x: Tensor, configured: bool = True) -> None:
    """Raises ValueError for fp64, which Triton's kernels do not have: they compute in fp32.

    configured: training has a setting kernels.<operation>, which mends it too.
    """
    if x.dtype not in _KERNEL_FLOATS:
        allowed = " or ".join(str(dtype) for dtype in _KERNEL_FLOATS)
        remedy = f"kernels.{operation}=torch or " * configured + f'use({operation}="torch")'
        raise refuse(f"{operation} with Triton", f"the dtype of {argument}", x.dtype, f"{allowed} (others: {remedy})")


def check_device(operation: str, argument: str, x: Tensor, like: Tensor) -> None:
    """Raises ValueError unless both tensors are on one device."""
    if x.device != like.device:
        raise refuse(operation, f"the device of {argument}", x.device, f"{like.device}, where the first argument is")


def check_probability(operation: str, argument: str, value: float) -> None:
    """Raises ValueError unless value is a number and 0 <= value < 1."""
    if not isinstance(value, _NUMBERS):
        raise refuse(operation, argument, kind_of(value), "a number")
    if not 0.0 <= value < 1.0:
        raise refuse(operation, argument, value, "at least 0 and less than 1")


def check_not_negative(operation: str, argument: str, value: float) -> None:
    """Raises ValueError unless value is a number and at least 0."""
    if not isinstance(value, _NUMBERS):
        raise refuse(operation, argument, kind_of(value), "a number")
    if not value >= 0.0:
        raise refuse(operation, argument, value, "at least 0")


def check_integer(operation: str, argument: str, value: int, least: int = 0, bits: int = 63) -> None:
    """Raises ValueError unless value is an integer and least <= value < 2^bits."""
    if not isinstance(value, _INTEGERS):
        raise refuse(operation, argument, kind_of(value), "an int")
    if not least <= value < 1 << bits:
        raise refuse(operation, argument, value, f"at least {least} and less than 2**{bits}")
