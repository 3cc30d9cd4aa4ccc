"""Linear layers, alone and several in one product: the same numbers as torch's, with the weight gradient now or later."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm_kernels.linear import join, linear, linears, weight_gradient

SIZES = (6, 2, 3)


class Queue:
    """Keeps what it is given."""

    def __init__(self, holds: bool = True):
        self.holds, self.left = holds, list[tuple]()

    def add(self, weights: tuple[Tensor, ...], x: Tensor, dy: Tensor) -> None:
        self.left.append((weights, x, dy))


def parts(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[nn.Parameter], list[nn.Parameter | None]]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)
    weights = [nn.Parameter(torch.randn(n, 8, dtype=dtype)) for n in SIZES]
    return x, weights, [nn.Parameter(torch.randn(n, dtype=dtype)) if bias else None for n in SIZES]


def backward(ys: tuple[Tensor, ...]) -> None:
    torch.stack([y.float().sin().sum() for y in ys]).sum().backward()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_in_one_product_equal_each_alone(bias: bool, dtype: torch.dtype) -> None:
    x, weights, biases = parts(bias, dtype)
    wanted_ys = tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    backward(wanted_ys)
    everything = [x, *weights, *(b for b in biases if b is not None)]
    wanted = [p.grad for p in everything]
    for p in everything:
        p.grad = None
    ys = linears(x, weights, biases)
    backward(ys)
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}  # bf16: one rounded sum instead of three
    for got, want in zip([*ys, *(p.grad for p in everything)], [*wanted_ys, *wanted], strict=True):
        torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.parametrize("bias", [False, True])
def test_a_queue_that_holds_gets_the_weight_gradient_and_autograd_the_rest(bias: bool) -> None:
    x, weights, biases = parts(bias)
    backward(tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)))
    wanted = [w.grad for w in weights]
    rest = [p for p in (x, *biases) if p is not None]
    wanted_rest = [p.grad for p in rest]
    for p in (*weights, *rest):
        p.grad = None
    queue = Queue()
    backward((*linears(x, weights[:2], biases[:2], queue), linear(x, weights[2], biases[2], queue)))
    assert all(w.grad is None for w in weights)
    for p, want in zip(rest, wanted_rest, strict=True):
        torch.testing.assert_close(p.grad, want)
    late = {id(w): part for ws, x_, dy in queue.left for w, part in zip(ws, gradient_parts(ws, x_, dy), strict=True)}
    for w, want in zip(weights, wanted, strict=True):
        torch.testing.assert_close(late[id(w)], want)


def gradient_parts(weights: tuple[Tensor, ...], x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    return weight_gradient(x, dy).split([w.shape[0] for w in weights])


def test_a_queue_that_does_not_hold_changes_nothing() -> None:
    x, weights, _ = parts(False)
    queue = Queue(holds=False)
    linear(x, weights[0], None, queue).sum().backward()
    torch.testing.assert_close(weights[0].grad, weight_gradient(x.detach(), torch.ones(2, 5, SIZES[0])))
    assert not queue.left


def test_the_queue_gets_the_very_parameters() -> None:
    x, weights, biases = parts(False)
    queue = Queue()
    linears(x, weights, biases, queue)[0].sum().backward()
    assert all(a is b for a, b in zip(queue.left[0][0], weights, strict=True))


def test_neighbours_in_memory_are_joined_without_a_copy() -> None:
    flat = torch.arange(11 * 8.0)
    weights = [nn.Parameter(part.view(-1, 8)) for part in flat.split([n * 8 for n in SIZES])]
    assert join(weights).data_ptr() == flat.data_ptr()
    assert torch.equal(join(weights), torch.cat(weights))
    assert torch.equal(join(weights[1:]), torch.cat(weights[1:]))
    for others in ([weights[0], weights[2]], [weights[1], weights[0]], [weights[0], nn.Parameter(torch.randn(2, 8))]):
        assert join(others).data_ptr() not in {w.data_ptr() for w in weights}
        assert torch.equal(join(others), torch.cat(others))


@pytest.mark.parametrize(("ours", "kept_alive"), [(True, False), (False, True)], ids=["ours", "torch's"])
def test_a_weight_that_is_released_after_the_forward_is_free(ours: bool, kept_alive: bool) -> None:
    """ZeRO-3 gives a gathered weight back when its layer is left; torch's linear holds on to it through a view."""
    x, (weight, *_), _ = parts(False)
    saved = list[Tensor]()
    gathered = weight.untyped_storage().data_ptr()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(x, weight, None, Queue(holds=False)) if ours else F.linear(x, weight)
    held = [t for t in saved if t is not weight and t.untyped_storage().data_ptr() == gathered]
    assert bool(held) == kept_alive
    y.sum().backward()
    assert weight.grad is not None
