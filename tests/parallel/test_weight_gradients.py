"""Weight gradients that wait arrive whole, once, in the right dtype, and behind the collective that they wait for."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.parallel.collectives import copy_to_region, gather_sequence
from megalm.parallel.topology import Group
from megalm.parallel.weight_gradients import WeightGradients, accumulate, compute
from megalm.testing import run_distributed
from megalm_kernels.linear import linear


def test_gradients_add_up_over_microbatches() -> None:
    queue, weight = WeightGradients(), nn.Parameter(torch.ones(3, 4))
    for n in (1, 2):
        queue.hold()
        linear(torch.full((2, 4), float(n)), weight, None, queue).sum().backward()
        waiting = queue.take()
        assert len(waiting) == 1 and not queue.holds
        compute(waiting)
    torch.testing.assert_close(weight.grad, torch.full((3, 4), 6.0))


def test_without_holding_autograd_does_it() -> None:
    queue, weight = WeightGradients(), nn.Parameter(torch.ones(3, 4))
    linear(torch.ones(2, 4), weight, None, queue).sum().backward()
    assert queue.take() == []
    torch.testing.assert_close(weight.grad, torch.full((3, 4), 2.0))


def test_what_is_held_for_the_executor_does_not_run_behind_a_collective() -> None:
    queue, weight = WeightGradients(overlap=True), nn.Parameter(torch.ones(3, 4))
    queue.hold()
    linear(torch.ones(2, 4), weight, None, queue).sum().backward()
    queue.run_behind_collective()
    assert weight.grad is None
    compute(queue.take())
    assert weight.grad is not None


@pytest.mark.parametrize(("dtype", "grad_dtype"), [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_the_gradient_has_the_dtype_that_the_parameter_asks_for(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(2, 3, dtype=dtype))
    parameter.grad_dtype = grad_dtype
    for _ in range(2):
        accumulate(parameter, torch.full((2, 3), 0.25, dtype=dtype))
    assert parameter.grad is not None and parameter.grad.dtype == grad_dtype
    torch.testing.assert_close(parameter.grad.float(), torch.full((2, 3), 0.5))


def test_a_released_weight_gets_its_gradient_too() -> None:
    """ZeRO-3 empties a weight between the two halves of the backward."""
    queue, weight = WeightGradients(), nn.Parameter(torch.ones(3, 4))
    queue.hold()
    linear(torch.ones(2, 4), weight, None, queue).sum().backward()
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)  # type: ignore[attr-defined]
    compute(queue.take())
    assert weight.shape == (0,) and weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.full((3, 4), 2.0))


# --- behind a collective ----------------------------------------------------------------------------------------------


def overlap(rank: int, world_size: int, with_sequence: bool) -> tuple[list[str], float, float]:
    """The order of events in a backward through `norm -> f -> linear`, and how far the gradients are from one rank's."""
    group = Group(tuple(range(world_size)), rank, dist.group.WORLD)
    queue, events = WeightGradients(overlap=True), list[str]()
    torch.manual_seed(0)
    weight, x = nn.Parameter(torch.randn(4, 6)), torch.randn(2, 4 * world_size, 6)
    mine = x.chunk(world_size, 1)[rank].clone().requires_grad_() if with_sequence else x.clone().requires_grad_()

    def meanwhile() -> None:
        events.append("computed behind" if weight.grad is None else "too early")
        queue.run_behind_collective()
        events.append("there" if weight.grad is not None else "missing")

    enter = gather_sequence if with_sequence else copy_to_region
    linear(enter(mine, group, meanwhile=meanwhile), weight, None, queue).square().sum().backward()
    wanted_x, wanted_w = x.clone().requires_grad_(), weight.detach().clone().requires_grad_()
    (wanted_x @ wanted_w.t()).square().sum().backward()
    assert wanted_x.grad is not None and mine.grad is not None and weight.grad is not None
    dx = wanted_x.grad.chunk(world_size, 1)[rank] if with_sequence else wanted_x.grad
    return events, difference(mine.grad, dx * world_size), difference(weight.grad, wanted_w.grad)


def difference(a: Tensor, b: Tensor | None) -> float:
    assert b is not None
    return (a - b).abs().max().item()


@pytest.mark.dist
@pytest.mark.parametrize("with_sequence", [False, True])
def test_weight_gradients_are_computed_while_the_input_gradient_travels(with_sequence: bool) -> None:
    for events, dx, dw in run_distributed(overlap, 2, with_sequence):
        assert events == ["computed behind", "there"]
        assert dx < 1e-4 and dw < 1e-4
