"""Linear layer and cross entropy in chunks, on a CPU: equal to all the logits at once, in less memory."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from megalm_kernels.cross_entropy import IGNORE
from megalm_kernels.linear_cross_entropy import (
    _gradients_op,
    _losses_op,
    _statistics_op,
    _sum_op,
    default_chunk,
    linear_cross_entropy,
    linear_cross_entropy_gradient,
    linear_cross_entropy_reference,
    linear_cross_entropy_statistics,
)
from tests.kernels.device.split_vocabulary import losses_in_parts

ALL = dict(label_smoothing=0.1, z_loss=0.02, softcap=3.0)
OPERATOR = (0.1, 0.02, IGNORE, 3.0, 4)


def case(tokens=11, size=6, vocab_size=13, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, size, generator=generator)
    weight = torch.randn(vocab_size, size, generator=generator)
    labels = torch.randint(vocab_size, (tokens,), generator=generator)
    labels[::5] = IGNORE
    return x.to(dtype), weight.to(dtype), labels


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("features", [{}, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("chunk", [0, 4, 11, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_all_the_logits_at_once(reduction, features, chunk, dtype):
    x, weight, labels = case(dtype=dtype)
    exact = [tensor.to(torch.float64, copy=True).requires_grad_() for tensor in (x, weight)]
    ours = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    found = linear_cross_entropy(*ours, labels, **features, reduction=reduction, chunk=chunk)
    wanted = linear_cross_entropy_reference(*exact, labels, **features)
    wanted = wanted.sum() if reduction == "sum" else wanted
    upstream = torch.tensor(1 / 3) if reduction == "sum" else torch.linspace(0.5, 2, 11)
    found.backward(upstream.to(found.dtype))
    wanted.backward(upstream.double())
    check_close(found, wanted, ours, exact, dtype)


def check_close(found, wanted, ours, exact, dtype):
    """The losses and the gradients of both leaves."""
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    close = dict(rtol=tolerance, atol=tolerance * (5 if dtype == torch.bfloat16 else 1))
    torch.testing.assert_close(found.detach().double(), wanted.detach(), **close)
    for a, b in zip(ours, exact, strict=True):
        assert a.grad.dtype == dtype
        torch.testing.assert_close(a.grad.double(), b.grad, **close)


@pytest.mark.parametrize("features", [{}, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("rows", [[8, 8], [5, 8, 3]], ids=["two", "one of padding only"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_vocabulary_in_parts_equals_the_whole(features, rows, dtype):
    x, weight, labels = case(dtype=dtype)
    exact = [tensor.to(torch.float64, copy=True).requires_grad_() for tensor in (x, weight)]
    ours = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    found = losses_in_parts(*ours, labels, rows, 4, **features)
    wanted = linear_cross_entropy_reference(*exact, labels, **features)
    for losses in (found, wanted):
        losses.backward(torch.linspace(0.5, 2, 11).to(losses.dtype))
    check_close(found, wanted, ours, exact, dtype)


def test_statistics_and_gradient_by_themselves():
    """The default is the whole vocabulary; no sum of logits unless asked for, no gradient through either, no tokens."""
    x, weight, labels = case()
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    found = linear_cross_entropy_statistics(*leaves, labels)
    logits = (x @ weight.t()).double()
    torch.testing.assert_close(found.largest.double() + found.total.double().log(), logits.logsumexp(-1))
    assert found.logit_sum.numel() == 0 and found.exponentials is None and not found.total.requires_grad
    grad = torch.linspace(0.5, 2, 11)
    gradients = linear_cross_entropy_gradient(*leaves, labels, found.largest, found.total, grad.requires_grad_())
    wanted = torch.autograd.grad(linear_cross_entropy(*leaves, labels), leaves, grad.detach())
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(gradients, wanted, strict=True))
    nothing = linear_cross_entropy_statistics(x[:0], weight, labels[:0], with_sum=True)
    assert [part.shape for part in nothing[:4]] == [(0,)] * 4
    dx, dweight = linear_cross_entropy_gradient(x[:0], weight, labels[:0], nothing.largest, nothing.total, grad[:0])
    assert dx.shape == (0, 6) and dweight.shape == (13, 6) and not dweight.any()


def test_bf16_weight_gradients_are_added_up_in_fp32():
    """Sixty-four equal chunks: added up in bf16 the later ones would be rounded away."""
    x, weight, labels = case(tokens=4, dtype=torch.bfloat16)
    many, of_many = x.repeat(64, 1), labels.repeat(64)
    grads = []
    for tokens, marks in ((x, labels), (many, of_many)):
        leaf = weight.clone().requires_grad_()
        linear_cross_entropy(tokens, leaf, marks, reduction="sum", chunk=4).backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0] * 64, grads[1])


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_only_the_gradients_that_are_needed(reduction):
    x, weight, labels = case()
    for frozen in (0, 1):
        leaves = [tensor.clone().requires_grad_(i != frozen) for i, tensor in enumerate((x, weight))]
        linear_cross_entropy(*leaves, labels, reduction=reduction, chunk=4).sum().backward()
        assert (leaves[frozen].grad, leaves[1 - frozen].grad is None) == (None, False)
    with torch.no_grad():
        losses = linear_cross_entropy(x.requires_grad_(), weight, labels, reduction=reduction)
    assert not losses.requires_grad


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_no_tokens(reduction):
    x, weight, labels = case()
    leaves = [x[:0].clone().requires_grad_(), weight.clone().requires_grad_()]
    linear_cross_entropy(*leaves, labels[:0], reduction=reduction).sum().backward()
    assert leaves[0].grad.shape == (0, 6) and not leaves[1].grad.any()


def peak_bytes(run) -> int:
    """The most that tensors held at one time on top of what there was, by the allocator's own account."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_peak_memory_is_that_of_a_chunk(reduction):
    """512 tokens, 4096 words: the logits are 8 MiB; a chunk's 0.5 MiB, of which torch's operators hold two at a time."""
    x, weight, labels = case(512, 16, 4096)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    ours = lambda: linear_cross_entropy(*leaves, labels, reduction=reduction, chunk=32).sum().backward()  # noqa: E731
    plain = lambda: linear_cross_entropy_reference(*leaves, labels).sum().backward()  # noqa: E731
    in_chunks, all_at_once = (peak_bytes(run) / 2**20 for run in (ours, plain))
    assert all_at_once > 16 and in_chunks < 2.5, f"{in_chunks:.1f} MiB in chunks, {all_at_once:.1f} MiB at once"


def test_peak_memory_of_a_part_of_the_vocabulary():
    """As above, of one part: its logits are 8 MiB, of two chunks 1 MiB, and there are dW and dx."""
    x, weight, labels = case(512, 16, 4096)
    place = dict(vocab_size=8192, chunk=32)

    def run():
        found = linear_cross_entropy_statistics(x, weight, labels, with_sum=True, **place)
        linear_cross_entropy_gradient(x, weight, labels, found.largest, found.total, torch.ones(512), **place)

    assert peak_bytes(run) / 2**20 < 2


def test_the_default_chunk():
    assert default_chunk(8192, 4096, 131072) == 2048  # logits of the size of x would be 256 tokens: too little work each
    assert default_chunk(65536, 4096, 32768) == 8192  # the logits of 8192 tokens are as large as x
    assert default_chunk(5000, 64, 50304) == 1680  # three equal parts, a multiple of 16
    assert default_chunk(7, 4, 11) == 16
    assert default_chunk(0, 4, 11) == 16


def test_opcheck():
    x, weight, labels = case()
    leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_(), labels, *OPERATOR)
    _, largest, total = _losses_op(x, weight, labels, *OPERATOR)
    torch.library.opcheck(_losses_op, leaves)
    torch.library.opcheck(_gradients_op, (x, weight, labels, largest, total, torch.ones(11), 0, 13, *OPERATOR, True, True))
    for with_sum in (False, True):
        torch.library.opcheck(_statistics_op, (x, weight, labels, 4, 15, 3.0, IGNORE, with_sum, 4))
    torch.library.opcheck(_sum_op, (*leaves, True, True))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_compiles_in_one_graph(reduction):
    x, weight, labels = case(dtype=torch.bfloat16)
    step = lambda x, w: linear_cross_entropy(x * 2, w, labels, **ALL, reduction=reduction, chunk=4).sum() / 3  # noqa: E731
    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = function(*leaves)
        loss.backward()
        found.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(found[0], found[1])


def test_a_part_of_the_vocabulary_compiles_in_one_graph():
    x, weight, labels = case(dtype=torch.bfloat16)
    place = dict(first=2, vocab_size=14, softcap=3.0, chunk=4)

    def step(x, weight):
        found = linear_cross_entropy_statistics(x * 2, weight, labels, with_sum=True, **place)
        grad = torch.ones_like(found.total)
        return *found[:4], *linear_cross_entropy_gradient(x * 2, weight, labels, found.largest, found.total, grad, **place)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(x, weight), compiled(x, weight))


WRONG = [
    (dict(x=torch.zeros(1, 11, 6)), "the shape of x"),
    (dict(x=torch.zeros(11, 6, dtype=torch.int64)), "the dtype of x"),
    (dict(weight=torch.zeros(13)), "the shape of weight"),
    (dict(weight=torch.zeros(13, 7)), "the shape of weight"),
    (dict(weight=torch.zeros(13, 6, dtype=torch.bfloat16)), "the dtype of weight"),
    (dict(weight=torch.zeros(13, 6, device="meta")), "the device of weight"),
    (dict(labels=torch.zeros(10, dtype=torch.int64)), "the shape of labels"),
    (dict(labels=torch.full((11,), 13)), "a label is 13, wanted 0 to 12"),
    (dict(reduction="mean"), "reduction is 'mean', wanted 'none' or 'sum'"),
    (dict(chunk=-1), "chunk is -1, wanted an int of at least 0"),
    (dict(chunk=2.0), "chunk is 2.0"),
    (dict(chunk=True), "chunk is True"),
    (dict(chunk="4"), "chunk is '4'"),
    (dict(z_loss=-1.0), "z_loss is -1.0"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=[f"{said} {i}" for i, (_, said) in enumerate(WRONG)])
def test_wrong_arguments(wrong, said):
    x, weight, labels = case()
    arguments = {"x": x, "weight": weight, "labels": labels, **wrong}
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {said}"):
        linear_cross_entropy(**arguments)


WRONG_OF_PARTS = [
    (dict(x=torch.zeros(1, 11, 6)), "the shape of x"),
    (dict(weight=torch.zeros(13, 6, dtype=torch.bfloat16)), "the dtype of weight"),
    (dict(first=-1), "first is -1"),
    (dict(vocab_size=13.0), "vocab_size is 13.0, wanted an int"),
    (dict(chunk=None), "chunk is None"),
    (dict(vocab_size=20, labels=torch.full((11,), 20)), "a label is 20, wanted 0 to 19"),
    (dict(softcap=-1.0), "softcap is -1.0"),
]
WRONG_OF_GRADIENT = [
    (dict(largest=torch.zeros(10)), "the shape of largest"),
    (dict(total=torch.ones(11, dtype=torch.bfloat16)), "the dtype of total"),
    (dict(grad=torch.ones(11, device="meta")), "the device of grad"),
    (dict(label_smoothing=1.0), "label_smoothing is 1.0"),
]


@pytest.mark.parametrize(("wrong", "said"), [*WRONG_OF_PARTS, *WRONG_OF_GRADIENT], ids=lambda value: str(value)[:20])
def test_wrong_arguments_of_parts(wrong, said):
    x, weight, labels = case()
    arguments = {"x": x, "weight": weight, "labels": labels, **wrong}
    if not set(wrong) & {"largest", "total", "grad", "label_smoothing"}:
        with pytest.raises(ValueError, match=f"linear_cross_entropy_statistics: {said}"):
            linear_cross_entropy_statistics(**arguments)
    numbers = {name: torch.ones(11) for name in ("largest", "total", "grad")}
    with pytest.raises(ValueError, match=f"linear_cross_entropy_gradient: {said}"):
        linear_cross_entropy_gradient(**numbers | arguments)
