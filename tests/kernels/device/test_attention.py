"""The attention kernels: lengths, head sizes, heads, dtypes, memory layouts, and numbers at the edge of their range."""

from __future__ import annotations

import pytest
import torch

from megalm_kernels import dispatch, flash_attention, flash_attention_reference, merge_attention
from megalm_kernels.attention.operators import attention_backward_op
from tests.kernels.device.attention_formula import Features, formula, same_as_formula, starts, tensors
from tests.kernels.device.attention_tiles import small_tiles
from tests.kernels.device.conftest import INTERPRETED, run


@pytest.fixture(autouse=True)
def kernels(device):
    with dispatch.use("auto", device.type, attention="triton"):
        yield


@pytest.fixture
def tiles(monkeypatch):
    small_tiles(monkeypatch)


# One row; less than a tile; whole tiles; a row more. Fewer queries than keys, as in decoding; more: the first see nothing
LENGTHS = [(1, 1), (7, 7), (32, 32), (33, 33), (1, 70), (20, 50), (65, 17), (50, 49)]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(lengths, causal, judge, device, tiles):
    batch, heads = (1, (1, 1)) if sum(lengths) > 50 else (3, (4, 2))
    same_as_formula(judge, tensors(lengths, heads, 32, torch.float32, device, batch=batch), causal=causal)


@pytest.mark.parametrize("lengths", [(129, 129), (64, 200)], ids=str)
def test_tiles_of_the_tables(lengths, judge, device, dtype):
    """As training runs them: with the first tiles whole, those at the diagonal, and those that are cut off."""
    same_as_formula(judge, tensors(lengths, (1, 1), 64, dtype, device, batch=1))


def test_all_keys_in_tiles_of_the_tables(judge, device):
    same_as_formula(judge, tensors((200, 129), (1, 1), 128, torch.bfloat16, device, batch=1), causal=False)


@pytest.mark.parametrize("width", [8, 32, 40, 64, 80, 96, 128, 192, 256])
def test_head_sizes(width, judge, device):
    """Both orders of heads that lie next to each other: those of a group are read by one descriptor."""
    same_as_formula(judge, tensors((20, 37), (2, 2), width, torch.bfloat16, device, batch=1))
    same_as_formula(judge, tensors((37, 20), (3, 1), width, torch.float32, device, batch=1), causal=False)


@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1)], ids=["one to one", "in groups", "one of k and v"])
def test_heads(heads, judge, device, tiles):
    same_as_formula(judge, tensors((16, 30), heads, 32, torch.float32, device))


def test_dtypes(judge, device, dtype, tiles):
    same_as_formula(judge, tensors((33, 45), (2, 1), 32, dtype, device, batch=1))


@pytest.mark.parametrize("features", [{}, dict(window=(3, -1)), dict(causal=False, window=(2, 1))], ids=str)
def test_more_queries_than_keys(features, device, tiles):
    """The first see nothing: zeros, lse -inf, and no gradient, even if one comes to them."""
    q, k, v = (x.requires_grad_() for x in tensors((60, 9), (2, 1), 32, torch.bfloat16, device, batch=1))
    out, lse = flash_attention(q, k, v, return_lse=True, **features)
    blind = 51 - max(features.get("window", (0, 0))[1], 0)
    assert (out[:, :blind] == 0).all() and (lse[..., :blind] == -torch.inf).all()
    assert torch.isfinite(lse[..., blind:]).all() and (out[:, blind:] != 0).any(-1).all()
    of_out, of_lse = torch.ones_like(out), torch.ones_like(lse)
    dq, dk, dv = torch.autograd.grad([out, lse], [q, k, v], [of_out, of_lse], retain_graph=True)
    assert (dq[:, :blind] == 0).all() and (dq[:, blind + 1 :] != 0).any()
    of_out[:, :blind], of_lse[..., :blind] = 1e4, -1e30
    again = torch.autograd.grad([out, lse], [q, k, v], [of_out, of_lse])
    assert all(torch.equal(*pair) for pair in zip(again, (dq, dk, dv), strict=True))


def found(q, k, v, **features) -> dict[str, torch.Tensor]:
    """Result, lse and gradients of copies in the memory that the tensors have now."""
    return run(lambda *x: flash_attention(*x, return_lse=True, **features), [x.detach() for x in (q, k, v)])


def test_any_strides(device, tiles):
    """The same numbers as from contiguous tensors: whatever a tensor descriptor can and cannot take."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = tensors((20, 20), (2, 1), 32, dtype, device)
        fused, zeros = torch.cat((q, k, v), dim=2), lambda *shape, dtype=dtype: torch.zeros(*shape, dtype=dtype, device=device)
        odd = zeros(2, 20, 2, 33)
        odd[..., 1:] = q
        views = {
            "parts of a projection": fused.split((2, 1, 1), dim=2),
            "(B, H, S, D) in memory": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
            "every other token": [torch.stack((x, x + 9), dim=2).flatten(1, 2)[:, ::2] for x in (q, k, v)],
            "rows of 33": (odd[..., 1:], k, v),
            "a base that is not aligned": [zeros(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in (q, k, v)],
            "channels apart": [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)],
            "keys and values in one": (q, *torch.cat((k, v), dim=-1).split(32, dim=-1)),
        }
        want = found(q, k, v)
        for name, inputs in views.items():
            assert all(torch.equal(a, b) for a, b in zip(inputs, (q, k, v), strict=True)), name
            for key, got in found(*inputs).items():
                assert torch.equal(got, want[key]), f"{name}, {dtype}: another {key}"


def test_strides_of_0(device, tiles):
    """One head, one sample, one token that stand for several."""
    q, k, v = tensors((20, 20), (4, 2), 32, torch.bfloat16, device)
    views = {
        "head": (q, k[:, :, :1].expand(-1, -1, 2, -1), v[:, :, :1].expand(-1, -1, 2, -1)),
        "sample": (q[:1].expand(2, -1, -1, -1), k[:1].expand(2, -1, -1, -1), v),
        "token": (q[:, :1].expand(-1, 20, -1, -1), k, v[:, :1].expand(-1, 20, -1, -1)),
    }
    for name, inputs in views.items():
        want = found(*(x.contiguous() for x in inputs))
        assert all(torch.equal(got, want[key]) for key, got in found(*inputs).items()), name


def test_any_strides_of_what_comes_beside(device, tiles):
    """Slopes, sinks and where packed sequences begin: every other number of a tensor, and one number that stands for several."""
    *inputs, sinks = tensors((12, 12), (2, 1), 32, torch.float32, device, batch=0, sinks=True)
    slopes, places = torch.rand(3, 2, generator=torch.Generator().manual_seed(0)).to(device), starts((5, 0, 7), device)
    apart = [torch.stack((x, x + 1), dim=-1).flatten(-2)[..., ::2] for x in (slopes, sinks, places)]
    views = {
        "every other number": (*apart, {}),
        "one slope of a sequence, one sink": (slopes[:, :1].expand(3, 2), sinks[:1].expand(2), places, {}),
        "one slope": (slopes[0, :1].expand(2), sinks, places, dict(causal=False)),
        "one place: nobody's rows": (slopes, sinks, places[:1].expand(4), {}),
    }

    def results(slopes, sinks, places, **features):
        features |= dict(alibi_slopes=slopes, cu_seqlens_q=places, cu_seqlens_k=places, return_lse=True)
        leaves = [x.detach() for x in (*inputs, sinks)]
        return run(lambda q, k, v, s: flash_attention(q, k, v, sinks=s, **features), leaves)

    for name, (*beside, features) in views.items():
        assert not all(x.is_contiguous() for x in beside), name
        want = results(*(x.clone(memory_format=torch.contiguous_format) for x in beside), **features)
        for key, got in results(*beside, **features).items():
            assert torch.equal(got, want[key]), f"{name}: another {key}"


def test_what_lies_between_heads_is_not_read(device, tiles):
    """Heads of 80 channels, 96 apart, with NaN between them; tokens with NaN between them."""
    q, k, v = tensors((20, 20), (4, 2), 80, torch.bfloat16, device, batch=1)
    apart = []
    for x in (q, k, v):
        wide = torch.full((1, 20, x.shape[2] + 1, 96), torch.nan, dtype=x.dtype, device=device)
        wide[:, :, :-1, :80] = x
        apart.append(wide[:, :, :-1, :80])
    want = found(q, k, v)
    assert all(torch.equal(got, want[key]) for key, got in found(*apart).items())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, dout = flash_attention(q, k, v), torch.full((1, 20, 5, 96), torch.nan, dtype=q.dtype, device=device)
    dout = dout[:, :, :-1, :80].copy_(torch.ones_like(q))
    pairs = (torch.autograd.grad(out, [q, k, v], d, retain_graph=True) for d in (dout, dout.contiguous()))
    assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))


def test_one_token_of_any_stride(device):
    """Of a dimension of size 1 torch allows any stride, and calls the tensor contiguous."""
    q, k, v = tensors((1, 1), (2, 1), 32, torch.float32, device, batch=1)
    odd = [x.as_strided(x.shape, (5, 7, 32, 1)) for x in (q, k, v)]
    want = found(q, k, v)
    assert all(torch.equal(got, want[key]) for key, got in found(*odd).items())


def test_gradients_of_any_strides(device, tiles):
    """Of the result: one number for all, one row for all, (B, H, S, D) in memory, every other token of a longer one."""
    q, k, v = (x.requires_grad_() for x in tensors((20, 20), (2, 1), 32, torch.bfloat16, device))
    out = flash_attention(q, k, v)
    dense = torch.randn(2, 20, 2, 32, generator=torch.Generator().manual_seed(1)).to(out)
    layouts = {
        "one number": torch.ones((), dtype=out.dtype, device=device).expand(out.shape),
        "one row": dense[:, :1].expand(out.shape),
        "(B, H, S, D)": dense.transpose(1, 2).contiguous().transpose(1, 2),
        "every other token": torch.stack((dense, dense), dim=2).flatten(1, 2)[:, ::2],
        "channels apart": dense.transpose(-1, -2).contiguous().transpose(-1, -2),
        "not aligned": torch.empty(dense.numel() + 3, dtype=out.dtype, device=device)[3:].view(out.shape).copy_(dense),
    }
    for name, dout in layouts.items():
        near = dout.clone(memory_format=torch.contiguous_format)
        pairs = (torch.autograd.grad(out, [q, k, v], d, retain_graph=True) for d in (dout, near))
        assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True)), name


def test_a_backward_over_some_of_the_keys(device, tiles):
    """As a ring has it, with result and lse of all keys, put together from the parts and in any memory: dk and dv are those of
    the whole, and the parts of dq add up to its."""
    q, k, v = (x.requires_grad_() for x in tensors((20, 40), (2, 1), 32, torch.float32, device, batch=1))
    places, features = (slice(0, 23), slice(23, 40)), dict(causal=False, scale=0.3, return_lse=True)
    whole = flash_attention(q, k, v, **features)
    dout, dlse = (torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x) for x in whole)
    want = torch.autograd.grad(whole, [q, k, v], [dout, dlse])
    q, k, v = (x.detach() for x in (q, k, v))
    merged = merge_attention([flash_attention(q, k[:, at], v[:, at], **features) for at in places])
    memory = {
        "as merged": merged,
        "heads before rows, or rows before heads": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in merged],
    }
    for name, (out, lse) in memory.items():
        given = (None, None, None, -1, -1, 0.3, 0.0, 0.0, 0, [0, 0, 0, 0], True)
        parts = [attention_backward_op(dout, dlse, q, k[:, at], v[:, at], out, lse, *given) for at in places]
        joined = (parts[0][0] + parts[1][0], *(torch.cat([part[i] for part in parts], dim=1) for i in (1, 2)))
        for got, expected in zip(joined, want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=name)


def test_only_some_gradients(device, tiles):
    inputs = tensors((16, 20), (2, 1), 32, torch.float32, device, batch=1, sinks=True)
    want = run(lambda q, k, v, s: flash_attention(q, k, v, sinks=s), inputs)
    weights = torch.randn(1, 16, 2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(inputs[0])
    for i in range(4):
        leaves = [x.detach().requires_grad_(n == i) for n, x in enumerate(inputs)]
        out = flash_attention(*leaves[:3], sinks=leaves[3])
        assert torch.equal(torch.autograd.grad(out, leaves[i], weights)[0], want[f"gradient {i}"]), f"of input {i} alone"


def test_only_the_lse_has_a_gradient(device, tiles):
    inputs = tensors((20, 33), (2, 1), 32, torch.float32, device, batch=1, sinks=True)
    found, want = (
        run(lambda q, k, v, s, f=f: f(q, k, v, sinks=s, return_lse=True)[1], [x.clone() for x in inputs])
        for f in (flash_attention, flash_attention_reference)
    )
    assert (found["gradient 2"] == 0).all()
    for name, got in found.items():
        torch.testing.assert_close(got, want.get(name, torch.zeros_like(got)), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("times", [100, 1e-4], ids=str)
def test_large_and_small_scores(times, judge, device, tiles):
    q, k, v = tensors((40, 40), (2, 1), 32, torch.float32, device, batch=1)
    same_as_formula(judge, [q * times, k, v], floor=2e-5)


def test_scores_beyond_half_precision(device, dtype, tiles):
    """Of some millions: each row sees one key only, and it is the right one."""
    q, k, v = tensors((40, 40), (2, 2), 32, dtype, device, batch=1)
    q, k = q * 250, k * 250
    got = found(q, k, v, scale=1.0)
    out, lse = formula(q.double(), k.double(), v.double(), scale=1.0)
    assert lse.max() > 1e6
    torch.testing.assert_close(got["output 0"].double(), out, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got["output 1"].double(), lse, rtol=0, atol=1e-6 * lse.max().item())
    assert all(torch.isfinite(x).all() for x in got.values())


def test_all_scores_far_below_zero(judge, device, tiles):
    """So far that their exponentials are 0 in fp32: a running maximum that begins at 0 would lose them."""
    q, k, v = tensors((40, 40), (1, 1), 32, torch.float32, device, batch=1)
    same_as_formula(judge, [q.abs() * 40, -k.abs(), v], floor=2e-5)


def test_nothing(device):
    """No batch, no queries, no keys; packed, no tokens, and no sequences."""
    for batch, queries, keys in ((0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0)):
        q, k, v = (x.requires_grad_() for x in tensors((queries, keys), (2, 1), 32, torch.bfloat16, device, batch=batch or 1))
        q, k, v = (x[:batch] for x in (q, k, v))
        out, lse = flash_attention(q, k, v, return_lse=True)
        assert out.shape == q.shape and lse.shape == (batch, 2, queries)
        assert (out == 0).all() and (lse == -torch.inf).all()
        for x, dx in zip((q, k, v), torch.autograd.grad(out.sum() + lse.exp().sum(), [q, k, v]), strict=True):
            assert dx.shape == x.shape and (dx == 0).all()
    q, k, v, sinks = (x.requires_grad_() for x in tensors((4, 0), (2, 1), 32, torch.float32, device, sinks=True))
    out, lse = flash_attention(q, k, v, sinks=sinks, return_lse=True)
    assert (out == 0).all() and torch.equal(lse, sinks[:, None].expand(2, 2, 4))
    assert (torch.autograd.grad(lse.sum(), sinks)[0] == 8).all()
    for count in (0, 3):
        q, k, v = (x.requires_grad_() for x in tensors((0, 0), (2, 1), 32, torch.bfloat16, device, batch=0))
        places = torch.zeros(count + 1, dtype=torch.int32, device=device)
        out, lse = flash_attention(q, k, v, cu_seqlens_q=places, cu_seqlens_k=places, return_lse=True)
        assert out.shape == (0, 2, 32) and lse.shape == (2, 0)
        assert [x.shape for x in torch.autograd.grad(out.sum(), [q, k, v])] == [q.shape, k.shape, v.shape]


def test_nothing_of_another_sequence_or_head(device, tiles):
    """One of them full of NaN, and of infinities: the others have the same bits."""
    q, k, v = tensors((20, 35), (4, 2), 32, torch.float32, device)
    want, bad = found(q, k, v), [x.clone() for x in (q, k, v)]
    for x, y in zip(bad, (torch.nan, torch.inf, -torch.inf), strict=True):
        x[1, :, : x.shape[2] // 2] = y
    for key, got in found(*bad).items():
        by_head = got.transpose(1, 2) if key == "output 1" else got
        expected = want[key].transpose(1, 2) if key == "output 1" else want[key]
        half = got.shape[1 if key == "output 1" else 2] // 2
        assert torch.equal(by_head[0], expected[0]) and torch.equal(by_head[1, :, half:], expected[1, :, half:]), key


CASES: dict[str, Features] = {"causal": {}, "dropout": dict(dropout_p=0.2, seed=5)}


@pytest.mark.parametrize("features", CASES)
def test_repeats_to_the_bit(features, device):
    lengths, heads, width, batch = ((40, 40), (2, 1), 32, 1) if INTERPRETED else ((1000, 1000), (8, 2), 128, 3)
    inputs = tensors(lengths, heads, width, torch.bfloat16, device, batch=batch)
    first = found(*inputs, **CASES[features])
    for _ in range(29):
        for name, again in found(*inputs, **CASES[features]).items():
            assert torch.equal(again, first[name]), f"{name}: another run gave other bits"


def test_gradients_in_any_order(judge, device, dtype, tiles):
    """deterministic=False: the same within the dtype; not by `judge`, because the bits may differ."""
    inputs = tensors((40, 50), (2, 1), 64, dtype, device, batch=1)
    want = run(formula, [x.double() for x in inputs])
    rough, got = run(formula, [x.clone() for x in inputs]), found(*inputs, deterministic=False)
    for name, exact in want.items():
        error, allowed = ((x[name].double() - exact).abs().max() for x in (got, rough))
        assert error <= 2 * allowed + max(2e-6, torch.finfo(dtype).eps / 2) * exact.abs().max(), f"{name}: off by {error}"


def test_the_tiles_do_not_matter(device, tiles):
    """Nor do they for what dropout drops."""
    inputs = tensors((50, 50), (1, 1), 32, torch.float32, device, batch=1)
    features = dict(dropout_p=0.3, seed=2**40 + 1, window=(40, -1))
    small = found(*inputs, **features)
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, (64, 64))
        large = found(*inputs, **features)
    for name, got in small.items():
        torch.testing.assert_close(got, large[name], rtol=1e-5, atol=1e-5 * large[name].abs().max().item(), msg=name)


def test_the_kernels_run(device, monkeypatch):
    """Else all of the above would compare torch with itself."""
    from megalm_kernels.device import attention_backward, attention_forward

    launched = []
    for module in (attention_forward, attention_backward):

        def launch(kernel, *args, launch=module.launch, **meta):
            launched.append(kernel)
            launch(kernel, *args, **meta)

        monkeypatch.setattr(module, "launch", launch)
    q, k, v = (x.requires_grad_() for x in tensors((5, 5), (1, 1), 32, torch.float32, device))
    out = flash_attention(q, k, v)
    forward = len(launched)
    torch.autograd.grad(out.sum(), [q, k, v])
    assert forward == 1 and len(launched) >= 3


needs_gpu = pytest.mark.skipif(INTERPRETED, reason="streams and graphs, which the interpreter does not have")
GRAPHS = {**CASES, "packed, with padding": dict(packed=(100, 0, 150)), "in any order": dict(deterministic=False)}


def step(q, k, v, dout, **features) -> list[torch.Tensor]:
    """Result and gradients; nothing else is launched, and nothing waited for."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = flash_attention(*leaves, **features)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@needs_gpu
@pytest.mark.parametrize("features", GRAPHS)
def test_a_graph_replays_forward_and_backward(features, device):
    """With the numbers that its inputs have by then."""
    given = dict(GRAPHS[features])
    if lengths := given.pop("packed", ()):
        given |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), starts(lengths, device))
    inputs = tensors((300, 300), (4, 2), 64, torch.bfloat16, device, batch=0 if lengths else 2)
    inputs.append(torch.randn_like(inputs[0]))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*inputs, **given)  # compiles: a capture must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(*inputs, **given)
    for x in inputs:
        x.copy_(x.flip(-1) + 1)
    want = step(*inputs, **given)
    for x in got:
        x.fill_(torch.nan)
    graph.replay()
    allowed = dict(rtol=0, atol=0) if given.get("deterministic", True) else dict(rtol=2**-6, atol=1e-2)
    for x, expected in zip(got, want, strict=True):
        torch.testing.assert_close(x, expected, **allowed)


@needs_gpu
def test_on_another_stream(device):
    """Where the inputs come late: kernels on the default stream would read NaN, which is there before."""
    inputs = tensors((300, 300), (4, 2), 64, torch.bfloat16, device)
    inputs.append(torch.randn_like(inputs[0]))
    want, late, slow = step(*inputs), [torch.full_like(x, torch.nan) for x in inputs], torch.ones(8192, 8192, device=device)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(10):
            slow @ slow
        for x, y in zip(late, inputs, strict=True):
            x.copy_(y)
        got = step(*late)
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_a_gpu_that_is_not_the_current_one():
    inputs = tensors((300, 300), (4, 2), 64, torch.bfloat16, torch.device("cuda", 0))
    with torch.cuda.device(0):
        want, got = found(*inputs), found(*(x.to("cuda:1") for x in inputs))
    for name, x in got.items():
        assert x.device.index == 1 and torch.equal(x.cpu(), want[name].cpu()), name
