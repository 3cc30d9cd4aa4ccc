"""Every operation: what runs equals its fp32 reference, forward and every gradient, on odd sizes too."""

import pytest
import torch

import megalm_kernels as ops

TOLERANCE = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.bfloat16: dict(rtol=2e-2, atol=2e-2)}


def _compare(run, reference, inputs, dtype):
    """Run both on copies of `inputs`; outputs and all gradients must agree."""
    results = []
    for function in (run, reference):
        args = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        out = function(*args)
        out.float().pow(2).sum().backward()
        results.append([out, *[a.grad for a in args if a.grad is not None]])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries,keys,heads,kv_heads", [(5, 5, 4, 4), (7, 7, 4, 2), (1, 9, 6, 1), (3, 8, 2, 2)])
def test_attention(queries, keys, heads, kv_heads, causal, dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, queries, heads, 8), torch.randn(2, keys, kv_heads, 8), torch.randn(2, keys, kv_heads, 8)
    run = lambda q, k, v: ops.flash_attention(q, k, v, causal=causal)  # noqa: E731
    reference = lambda q, k, v: ops.flash_attention_reference(q, k, v, causal=causal)  # noqa: E731
    _compare(run, reference, [q.to(dtype), k.to(dtype), v.to(dtype)], dtype)


def test_causal_attention_looks_back_only():
    q, k, v = (torch.randn(1, 6, 2, 4) for _ in range(3))
    before = ops.flash_attention(q, k, v)
    k[:, 4:], v[:, 4:] = 9.0, 9.0
    after = ops.flash_attention(q, k, v)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])
