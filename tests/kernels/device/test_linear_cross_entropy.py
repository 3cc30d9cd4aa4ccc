"""Linear layer and cross entropy on the kernels: chunks that do not divide the tokens, both reductions, every feature,
and the vocabulary in parts.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm_kernels import dispatch
from megalm_kernels.cross_entropy import IGNORE
from megalm_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tests.kernels.device.split_vocabulary import losses_in_parts

ALL = dict(label_smoothing=0.1, z_loss=0.02, softcap=3.0)


@pytest.fixture(autouse=True)
def kernels(device):
    with dispatch.use("triton", device.type):
        yield


def case(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, 16, generator=generator).to(device, dtype)
    weight = torch.randn(40, 16, generator=generator).to(device, dtype)
    labels = torch.randint(40, (11,), generator=generator).to(device)
    labels[::4] = IGNORE
    return x, weight, labels


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("features", [{}, ALL], ids=["plain", "all"])
def test_losses_and_gradients(reduction, features, device, dtype, judge):
    x, weight, labels = case(device, dtype)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        losses = linear_cross_entropy_reference(x, weight, labels, **features)
        return losses.sum() if reduction == "sum" else losses

    ours = lambda x, weight: linear_cross_entropy(x, weight, labels, **features, reduction=reduction, chunk=4)  # noqa: E731
    judge(ours, plain, [x, weight])


def test_a_vocabulary_in_parts(device, dtype, judge):
    """The second part ends in padding; the third is nothing else."""
    x, weight, labels = case(device, dtype)
    ours = lambda x, weight: losses_in_parts(x, weight, labels, [24, 24, 8], chunk=4, **ALL)  # noqa: E731
    judge(ours, lambda x, weight: linear_cross_entropy_reference(x, weight, labels, **ALL), [x, weight])
