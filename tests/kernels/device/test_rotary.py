"""The rotary kernel: every layout of the channels, the positions and the memory; in place; back again."""

from __future__ import annotations

import pytest
import torch

from megalm_kernels import dispatch, rotary, rotary_reference
from megalm_kernels.rotary import rotary_op


@pytest.fixture(autouse=True)
def kernels(device):
    with dispatch.use("triton", device.type):
        yield


def angles(positions: int, half: int, device: torch.device, dtype: torch.dtype = torch.float32):
    """cos and sin (P, R/2) of angles in no pattern."""
    angle = torch.rand(positions, half, generator=torch.Generator().manual_seed(3)) * 6.3
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


# (B, S, H, D), R: one head and many; heads that no tile divides; halves that are no power of two; a rest that is passed on
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "turned"), [((2, 5, 3, 16), 16), ((1, 37, 4, 20), 12), ((3, 1, 40, 10), 2), ((1, 3, 1, 130), 130)]
)
def test_rotary(shape, turned, interleaved, device, dtype, judge):
    x = torch.randn(shape, dtype=dtype, device=device)
    cos, sin = angles(shape[1] + 2, turned // 2, device)
    judge(
        lambda x: rotary(x, cos, sin, interleaved=interleaved),
        lambda x: rotary_reference(x, cos.double(), sin.double(), None, interleaved),
        [x],
    )


@pytest.mark.parametrize("places", ["one per token", "one per token of a sample", "packed"])
def test_rotary_at_given_positions(places, device, dtype, judge):
    shape = (9, 6, 8) if places == "packed" else (3, 9, 6, 8)
    x = torch.randn(shape, dtype=dtype, device=device)
    of = (3, 9) if places == "one per token of a sample" else (9,)
    positions = torch.randint(0, 20, of, generator=torch.Generator().manual_seed(0)).to(device)
    cos, sin = angles(20, 4, device, torch.bfloat16)  # angles in bf16 are exact in fp32
    judge(
        lambda x: rotary(x, cos, sin, positions=positions),
        lambda x: rotary_reference(x, cos, sin, positions),
        [x],
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_in_place(interleaved, device, dtype, judge):
    """Of a slice of a projection: its other columns stay, and gradients flow through all of them."""
    x = torch.randn(2, 5, 6 * 12, dtype=dtype, device=device)
    cos, sin = angles(5, 4, device)

    def ours(x):
        y = x * 1.0  # a leaf cannot be written into
        rotary(y.unflatten(-1, (6, 12))[:, :, 1:4], cos, sin, interleaved=interleaved, inplace=True)
        return y

    def plain(x):
        y = x.unflatten(-1, (6, 12))
        turned = rotary_reference(y[:, :, 1:4], cos, sin, None, interleaved)
        return torch.cat((y[:, :, :1], turned, y[:, :, 4:]), dim=2).flatten(2)

    judge(ours, plain, [x])


def test_rotary_reads_any_strides(device, dtype):
    fused = torch.randn(2, 7, 10, 8, dtype=dtype, device=device)
    cos, sin = angles(7, 4, device)
    views = {
        "heads of a projection": fused[:, :, 2:5],
        "(B, H, S, D) in memory": fused.transpose(1, 2).contiguous().transpose(1, 2),
        "a sequence in steps": fused[:, ::2],
        "channels apart": fused.transpose(-1, -2).contiguous().transpose(-1, -2),
    }
    for name, x in views.items():
        assert torch.equal(rotary(x, cos, sin), rotary(x.contiguous(), cos, sin)), name
    written = views["channels apart"].clone(memory_format=torch.preserve_format)
    assert torch.equal(rotary(written, cos, sin, inplace=True), rotary(fused, cos, sin))
    assert torch.equal(written, rotary(fused, cos, sin))


def test_rotary_back_is_the_inverse(device):
    x = torch.randn(2, 5, 3, 16, device=device)
    cos, sin = angles(5, 6, device)
    for interleaved in (False, True):
        there = rotary_op(x, cos, sin, None, interleaved, False)
        torch.testing.assert_close(rotary_op(there, cos, sin, None, interleaved, True), x, rtol=0, atol=1e-6)
        assert not torch.allclose(there, x)


def test_rotary_of_nothing(device, dtype):
    cos, sin = angles(4, 2, device)
    for shape in ((0, 4, 2, 4), (2, 0, 2, 4), (0, 2, 4)):
        assert rotary(torch.empty(shape, dtype=dtype, device=device), cos, sin).shape == shape


def test_a_position_without_angles_becomes_nan_and_reads_nothing(device):
    """What a GPU does, which cannot refuse without waiting for it. The operator, because the function refuses on a CPU."""
    x, (cos, sin) = torch.randn(3, 2, 8, device=device), angles(4, 4, device)
    y = rotary_op(x, cos, sin, torch.tensor([4, 3, -1], device=device), False, False)
    assert y.isnan().all(-1).all(-1).tolist() == [True, False, True] and not y[1].isnan().any()
