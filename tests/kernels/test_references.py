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
@pytest.mark.parametrize("width", [1, 7, 64, 129])
def test_norms(width, dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, width), 1 + 0.1 * torch.randn(width), torch.randn(width)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    scaled = lambda f: lambda *a: 0.1 * f(*a)  # noqa: E731  keeps bf16 gradients of order 1
    _compare(scaled(ops.rms_norm), scaled(ops.rms_norm_reference), [x, weight], dtype)
    if width > 1:  # the variance of one number is 0: the gradient there is noise over eps
        _compare(scaled(ops.layer_norm), scaled(ops.layer_norm_reference), [x, weight, bias], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries,keys,heads,kv_heads", [(5, 5, 4, 4), (7, 7, 4, 2), (1, 9, 6, 1), (3, 8, 2, 2)])
def test_attention(queries, keys, heads, kv_heads, causal, dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, queries, heads, 8), torch.randn(2, keys, kv_heads, 8), torch.randn(2, keys, kv_heads, 8)
    run = lambda q, k, v: ops.flash_attention(q, k, v, causal)  # noqa: E731
    reference = lambda q, k, v: ops.flash_attention_reference(q, k, v, causal)  # noqa: E731
    _compare(run, reference, [q.to(dtype), k.to(dtype), v.to(dtype)], dtype)


def test_causal_attention_looks_back_only():
    q, k, v = (torch.randn(1, 6, 2, 4) for _ in range(3))
    before = ops.flash_attention(q, k, v)
    k[:, 4:], v[:, 4:] = 9.0, 9.0
    after = ops.flash_attention(q, k, v)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_rotary_keeps_length_and_depends_on_distance_only():
    angles = torch.arange(6)[:, None] * torch.tensor([1.0, 0.1])[None]
    cos, sin = angles.cos(), angles.sin()
    q, k = torch.randn(4).expand(1, 6, 1, 4), torch.randn(4).expand(1, 6, 1, 4)
    turned_q, turned_k = ops.rotary(q, cos, sin), ops.rotary(k, cos, sin)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    scores = turned_q[0, :, 0] @ turned_k[0, :, 0].T
    torch.testing.assert_close(scores.diagonal(1), scores.diagonal(1)[:1].expand(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype):
    _compare(ops.swiglu, ops.swiglu_reference, [torch.randn(3, 17).to(dtype), torch.randn(3, 17).to(dtype)], dtype)


def test_cross_entropy_counts_no_ignored_label():
    logits, labels = torch.randn(6, 11), torch.tensor([0, 10, -100, 3, -100, 7])
    _compare(
        lambda x: ops.cross_entropy(x, labels),
        lambda x: ops.cross_entropy_reference(x, labels),
        [logits],
        torch.float32,
    )
    assert ops.cross_entropy(logits, labels)[[2, 4]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("size", [1, 17, 1000])
def test_fused_adam(size):
    torch.manual_seed(0)
    states = [[torch.linspace(-1, 1, size), torch.zeros(size), torch.zeros(size)] for _ in range(2)]
    settings = dict(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        grad = torch.randn(size)
        for (param, m, v), function in zip(states, (ops.fused_adam, ops.fused_adam_reference), strict=True):
            function(param, grad.clone(), m, v, step=step, **settings)
    for got, want in zip(*states, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_fused_adam_is_torch_adamw():
    param = torch.nn.Parameter(torch.linspace(-1, 1, 33))
    mine, m, v = param.detach().clone(), torch.zeros(33), torch.zeros(33)
    oracle = torch.optim.AdamW([param], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 4):
        param.grad = torch.randn(33)
        ops.fused_adam(mine, param.grad, m, v, step=step, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
        oracle.step()
    torch.testing.assert_close(mine, param.detach())
