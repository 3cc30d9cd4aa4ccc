"""Cross entropy on a CPU: torch's operators against the formula, the operators of the kernels, compiled, wrong arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalm_kernels import cross_entropy_reference, dispatch
from megalm_kernels.cross_entropy import (
    IGNORE,
    _cross_entropy_triton,
    _gradient_inplace_op,
    _gradient_op,
    _losses_op,
    _statistics_op,
    cross_entropy,
    cross_entropy_gradient,
    cross_entropy_statistics,
)

ALL = dict(label_smoothing=0.1, z_loss=0.02, softcap=3.0)
OPERATOR = (0.1, 0.02, IGNORE, 3.0)  # the same, in the order of the operators


@pytest.fixture(params=["torch", "operators"])
def backend(request, monkeypatch):
    """torch's own autograd, and the operators that on a GPU are the kernels (here with their plain bodies)."""
    with dispatch.use("torch", "cpu"):
        if request.param == "operators":
            _, choice = dispatch._chosen["cross_entropy"]
            monkeypatch.setitem(dispatch._chosen, "cross_entropy", (_cross_entropy_triton, choice))
        yield request.param


def case(dtype=torch.float32, rows=7, columns=13):
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(rows, columns, generator=generator)
    labels = torch.randint(columns, (rows,), generator=generator)
    labels[::3] = IGNORE
    return logits.to(dtype), labels


@pytest.mark.parametrize("features", [{}, dict(label_smoothing=0.1), dict(z_loss=0.02), dict(softcap=3.0), ALL])
@pytest.mark.parametrize("inplace", [False, True])
def test_equals_the_formula(features, inplace, backend):
    logits, labels = case()
    x, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    y = x * 1
    losses = cross_entropy(y, labels, **features, inplace=inplace)
    wanted = cross_entropy_reference(exact, labels, **features)
    weights = torch.linspace(0.5, 2, 7)
    losses.backward(weights)
    wanted.backward(weights.double())
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-6, atol=1e-6)
    assert not losses[labels == IGNORE].any() and losses.dtype == torch.float32
    assert inplace or torch.equal(y.detach(), logits), "the caller's logits are left alone"


def test_the_reference_is_torchs_cross_entropy_and_its_features_are_as_said():
    logits, labels = case(torch.float64)
    counted = labels != IGNORE
    kept = dict(ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(cross_entropy_reference(logits, labels), F.cross_entropy(logits, labels, **kept))
    smoothed = F.cross_entropy(logits, labels, **kept, label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy_reference(logits, labels, label_smoothing=0.1), smoothed)
    added = cross_entropy_reference(logits, labels, z_loss=0.5) - cross_entropy_reference(logits, labels)
    torch.testing.assert_close(added, 0.5 * logits.logsumexp(-1) ** 2 * counted)
    capped = cross_entropy_reference(3 * torch.tanh(logits / 3), labels)
    torch.testing.assert_close(cross_entropy_reference(logits, labels, softcap=3.0), capped)
    renamed = cross_entropy_reference(logits, labels.where(counted, 5), ignore_index=5)
    assert not renamed[~counted].any() and torch.equal(renamed != 0, counted & (labels != 5))


def test_on_a_cpu_the_models_call_is_torchs_to_the_bit():
    logits, labels = case(rows=50, columns=301)
    found = []
    for function in (cross_entropy, lambda x, y: F.cross_entropy(x.float(), y, ignore_index=-100, reduction="none")):
        x = logits.clone().requires_grad_()
        losses = function(x, labels)
        losses.sum().backward()
        found.append((losses.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [{}, ALL], ids=["plain", "all"])
def test_two_parts_of_a_vocabulary(features, dtype, backend):
    """With what was kept of the forward, and without; the second part ends in padding."""
    logits, labels = case(dtype)
    parts = [logits[:, :8].clone(), torch.cat((logits[:, 8:], torch.full((7, 3), torch.nan, dtype=dtype)), 1)]
    softcap, scalars = features.get("softcap", 0.0), {k: v for k, v in features.items() if k != "softcap"}
    places = [dict(first=first, vocab_size=13, softcap=softcap) for first in (0, 8)]
    found = [cross_entropy_statistics(x, labels, **at) for x, at in zip(parts, places, strict=True)]
    largest = torch.maximum(*(part.largest for part in found))
    total = sum(part.total * torch.exp(part.largest - largest) for part in found)
    exact = logits.double().requires_grad_()
    wanted = cross_entropy_reference(exact, labels, **features)
    wanted.sum().backward()
    if not scalars:
        losses = (largest + total.log() - sum(part.target for part in found)).where(labels != IGNORE, 0)
        torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-6, atol=1e-6)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    for part, x, at, columns in zip(found, parts, places, (slice(0, 8), slice(8, 13)), strict=True):
        forms = [(x, None)] if part.exponentials is None else [(x, None), (part.exponentials, part.largest)]
        for form, anchor in forms:
            before = form.clone()
            made = cross_entropy_gradient(form, labels, largest, total, torch.ones(7), **at, **scalars, anchor=anchor)
            torch.testing.assert_close(form, before, rtol=0, atol=0, equal_nan=True)
            wanted_here = exact.grad[:, columns]
            close = dict(rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(made[:, : wanted_here.shape[1]].double(), wanted_here, **close)
            assert not made[:, 5:].any() or at["first"] == 0
            over = cross_entropy_gradient(
                form, labels, largest, total, torch.ones(7), **at, **scalars, anchor=anchor, inplace=True
            )
            assert over.data_ptr() == form.data_ptr() and torch.equal(over, made)
            form.copy_(before)
    assert (found[0].exponentials is not None) == (backend == "torch" and not softcap)


def test_opcheck():
    logits, labels = case()
    largest, total = _losses_op(logits, labels, *OPERATOR, False)[1:]
    rest = (labels, largest, total, torch.ones(7), 0, 13, *OPERATOR)
    torch.library.opcheck(_losses_op, (logits.clone().requires_grad_(), labels, *OPERATOR, False))
    torch.library.opcheck(_statistics_op, (logits, labels, 0, 13, 3.0, IGNORE, True))
    torch.library.opcheck(_gradient_op, (logits, *rest))
    torch.library.opcheck(_gradient_inplace_op, (logits, *rest))


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_in_one_graph(inplace, backend):
    logits, labels = case()
    step = lambda x: cross_entropy(x * 2, labels, **ALL, inplace=inplace).sum()  # noqa: E731
    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = logits.clone().requires_grad_()
        loss = function(x)
        loss.backward()
        found.append((loss.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1])


def test_a_second_backward_over_overwritten_logits_is_an_error():
    logits, labels = case()
    y = logits.requires_grad_() * 1
    loss = _cross_entropy_triton(y, labels, 0.0, 0.0, IGNORE, 0.0, True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


WRONG = [
    (dict(logits=torch.zeros(2, 7, 13)), "the shape of logits"),
    (dict(logits=torch.zeros(7, 13, dtype=torch.int64)), "the dtype of logits"),
    (dict(labels=torch.zeros(6, dtype=torch.int64)), "the shape of labels"),
    (dict(labels=torch.zeros(7, dtype=torch.int32)), "the dtype of labels"),
    (dict(labels=torch.zeros(7, dtype=torch.int64, device="meta")), "the device of labels"),
    (dict(labels=torch.full((7,), 13)), "a label is 13, wanted 0 to 12, or -100"),
    (dict(labels=torch.full((7,), -1)), "a label is -1"),
    (dict(label_smoothing=1.0), "label_smoothing is 1.0"),
    (dict(z_loss=-1.0), "z_loss is -1.0, wanted at least 0"),
    (dict(softcap=-30.0), "softcap is -30.0"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=[said for _, said in WRONG])
def test_wrong_arguments(wrong, said):
    logits, labels = case()
    arguments = {"logits": logits, "labels": labels, **wrong}
    with pytest.raises(ValueError, match=f"cross_entropy: {said}"):
        cross_entropy(**arguments)


def test_wrong_arguments_of_the_parts():
    logits, labels = case()
    with pytest.raises(ValueError, match="cross_entropy_statistics: a label is"):
        cross_entropy_statistics(logits, labels.clamp(min=0) + 20, first=13, vocab_size=20)
    rows = [torch.ones(7), torch.ones(7), torch.ones(7)]
    with pytest.raises(ValueError, match="cross_entropy_gradient: the shape of total"):
        cross_entropy_gradient(logits, labels, rows[0], torch.ones(6), rows[2])
    with pytest.raises(ValueError, match=r"cross_entropy_gradient: softcap is 3\.0, wanted 0 with exponentials"):
        cross_entropy_gradient(logits, labels, *rows, softcap=3.0, anchor=rows[0])


def test_the_kernels_refuse_fp64():
    logits, labels = case(torch.float64)
    with pytest.raises(ValueError, match=r"the dtype of logits is torch\.float64"):
        _cross_entropy_triton(logits, labels, 0.0, 0.0, IGNORE, 0.0, False)
