"""The norm kernel against fp64, over lists and over a number of partial sums that one program cannot hold."""

from __future__ import annotations

import pytest
import torch

import megalm_kernels as ops
from megalm_kernels import dispatch
from tests.kernels.device import far_memory


@pytest.fixture(autouse=True)
def triton(device):
    with dispatch.use("triton", device.type, l2_norm="triton"):
        yield


def some(sizes, dtype, device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


@pytest.mark.parametrize("sizes", [(1,), (3, 0, 8192), (8193, (7, 5), 16400, ())])
def test_against_fp64(sizes, dtype, device):
    tensors = some(sizes, dtype, device)
    exact = ops.l2_norm_reference([x.double() for x in tensors])
    ours, again = ops.l2_norm(tensors), ops.l2_norm(tensors)
    assert (ours.dtype, ours.shape, ours.device.type) == (torch.float32, (), device.type)
    assert torch.equal(ours, again)
    assert abs(ours.item() / exact.item() - 1) < 2e-7


def test_many_partial_sums(device, monkeypatch):
    """More than a block of them: the second stage goes round, and its last round is not full."""
    from megalm_kernels.device import l2_norm as on_device

    monkeypatch.setattr(on_device, "lookup", lambda *a: dict(BLOCK=16, num_warps=4))
    tensors = some((16 * 35 + 3, 16), torch.float32, device)
    exact = ops.l2_norm_reference([x.double() for x in tensors])
    assert abs(ops.l2_norm(tensors).item() / exact.item() - 1) < 2e-7


def test_a_buffer_and_its_views(device):
    """Of a view with gaps only what is in it counts; one tensor is a list of one."""
    x = some([(6, 50)], torch.bfloat16, device)[0]
    part = x[:, 3:20]
    assert torch.equal(ops.l2_norm(part), ops.l2_norm([part.clone()]))
    assert torch.equal(ops.l2_norm(x), ops.l2_norm([x.flatten()]))


def test_nothing_and_not_a_number(device):
    nothing = torch.zeros(0, device=device)
    assert ops.l2_norm([nothing, nothing]).item() == 0.0
    assert torch.isnan(ops.l2_norm([nothing, torch.tensor([1.0, torch.nan], device=device)]))
    assert ops.l2_norm(torch.full((20,), 1e30, device=device)).item() == torch.inf  # as the text says


def beyond_int32(device: torch.device) -> None:
    """The only elements that are not 0 are the last; in the interpreter only their program runs, into cleared partial sums."""
    from megalm_kernels.device import l2_norm as on_device

    x = far_memory.zeros(far_memory.COUNT, torch.bfloat16, device)
    x[-4:] = 1.0
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).zero_()  # type: ignore[assignment]
    far_memory.run_last_programs(on_device, device)
    assert on_device.l2_norm([x]).item() == 2.0


def test_addresses_beyond_int32(device):
    far_memory.run_far(__name__, "beyond_int32", device)
