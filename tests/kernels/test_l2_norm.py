"""The norm on the CPU: against fp64, as an operator of torch, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import megalm_kernels as ops
from megalm_kernels.l2_norm import _l2_norm_op, _l2_norm_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_against_fp64(dtype):
    tensors = [torch.randn(7, 5).to(dtype), torch.randn(0).to(dtype), torch.randn(1001).to(dtype)[::3]]
    exact = ops.l2_norm_reference([x.double() for x in tensors])
    for got in (ops.l2_norm(tensors), ops.l2_norm_reference(tensors)):
        assert (got.dtype, got.shape) == (torch.float32, ())
        torch.testing.assert_close(got.double(), exact, rtol=5e-7, atol=0)
    torch.testing.assert_close(ops.l2_norm(tensors[0]), tensors[0].float().norm())


def test_it_has_no_gradient():
    assert not ops.l2_norm([torch.ones(3, requires_grad=True)]).requires_grad


def test_opcheck_and_compile():
    tensors = [torch.randn(5), torch.randn(3, 3)]
    torch.library.opcheck(_l2_norm_op, (tensors,))
    compiled = torch.compile(lambda xs: _l2_norm_triton(xs) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(tensors), 2 * ops.l2_norm(tensors))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="l2_norm: tensors is empty, wanted at least one tensor"):
        ops.l2_norm([])
    with pytest.raises(ValueError, match=r"l2_norm: the dtype of tensors\[1\] is torch.int64"):
        ops.l2_norm([torch.ones(2), torch.ones(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"l2_norm: the device of tensors\[1\] is meta, wanted cpu"):
        ops.l2_norm([torch.ones(2), torch.ones(2, device="meta")])
