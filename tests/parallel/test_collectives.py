"""Each collective against the same arithmetic in one process: forward, backward, both dims, and a group of one."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalm.parallel.collectives import (
    all_gather,
    all_reduce,
    copy_to_region,
    gather_sequence,
    reduce_scatter,
    scatter_sum,
    sum_from_region,
)
from megalm.parallel.topology import Group
from megalm.testing import run_distributed

SIZE = 3
PAIRS = {
    "copy_to_region": copy_to_region,
    "sum_from_region": sum_from_region,
    "gather_sequence-0": functools.partial(gather_sequence, dim=0),
    "gather_sequence-1": functools.partial(gather_sequence, dim=1),
    "scatter_sum-0": functools.partial(scatter_sum, dim=0),
    "scatter_sum-1": functools.partial(scatter_sum, dim=1),
}


def tensor_of(rank: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Integers in fp32, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randint(-9, 10, shape, generator=generator).float()


def inputs() -> list[Tensor]:
    return [tensor_of(rank, (6, 9, 2), 1) for rank in range(SIZE)]


def gradients(like: list[Tensor]) -> list[Tensor]:
    return [tensor_of(rank, tuple(y.shape), 2) for rank, y in enumerate(like)]


def oracle(name: str, xs: list[Tensor]) -> list[Tensor]:
    """What every rank must get, written with ordinary differentiable operations on all ranks' inputs."""
    kind, _, dim = name.partition("-")
    if kind == "copy_to_region":
        return [x * 1 for x in xs]
    if kind == "sum_from_region":
        return [torch.stack(xs).sum(0)] * SIZE
    if kind == "gather_sequence":
        return [torch.cat(xs, int(dim))] * SIZE
    return list(torch.stack(xs).sum(0).chunk(SIZE, int(dim)))


def run_pairs(rank: int, world_size: int) -> dict:
    group = Group(tuple(range(world_size)), rank, dist.group.WORLD)
    results = {}
    for name, pair in PAIRS.items():
        x = inputs()[rank].requires_grad_()
        kept = x.detach().clone()
        y = pair(x, group)
        grad = tensor_of(rank, tuple(y.shape), 2)
        y.backward(grad)
        assert torch.equal(x, kept), f"{name} changed its input"
        assert torch.equal(grad, tensor_of(rank, tuple(y.shape), 2)), f"{name} changed the incoming gradient"
        results[name] = (y.detach(), x.grad)
        # An input that is not contiguous goes the same way.
        turned = kept.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        z = pair(turned, group)
        z.backward(grad)
        assert torch.equal(z, y) and torch.equal(turned.grad, x.grad), name
    x = inputs()[rank]
    results["gather"] = [all_gather(x, group, dim) for dim in (0, 1, -1)]
    results["scatter"] = [reduce_scatter(x, group, dim) for dim in (0, 1)]
    same = x.clone()
    assert all_reduce(same, group) is same
    results["sum"], results["max"] = same, all_reduce(x.clone(), group, dist.ReduceOp.MAX)
    return {key: as_numpy(value) for key, value in results.items()}


def as_numpy(value):
    """Tensors cross to the parent as plain arrays: no shared memory that outlives the rank."""
    return [v.numpy() for v in value] if isinstance(value, (list, tuple)) else value.numpy()


@pytest.fixture(scope="module")
def by_rank() -> list[dict]:
    return run_distributed(run_pairs, SIZE)


@pytest.mark.dist
@pytest.mark.parametrize("name", PAIRS)
def test_pair_forward_and_backward_equal_one_process(by_rank, name):
    xs = [x.requires_grad_() for x in inputs()]
    outputs = oracle(name, xs)
    grads = gradients(outputs)
    kind = name.partition("-")[0]
    if kind == "copy_to_region":  # the region's parts all came from one x: its gradient is the sum over the ranks
        expected = [torch.stack(grads).sum(0)] * SIZE
    elif kind == "sum_from_region":  # every rank goes on with the same whole, whose gradient every rank knows
        expected = grads
    else:  # truly one graph over all ranks: differentiate it
        torch.autograd.backward(outputs, grads)
        expected = [x.grad for x in xs]
    for rank in range(SIZE):
        y, grad = (torch.from_numpy(v) for v in by_rank[rank][name])
        assert torch.equal(y, outputs[rank])
        assert torch.equal(grad, expected[rank])


@pytest.mark.dist
def test_plain_collectives(by_rank):
    xs = inputs()
    total = torch.stack(xs).sum(0)
    for rank, seen in enumerate(by_rank):
        for dim, joined in zip((0, 1, -1), seen["gather"], strict=True):
            assert torch.equal(torch.from_numpy(joined), torch.cat(xs, dim))
        for dim, part in enumerate(seen["scatter"]):
            assert torch.equal(torch.from_numpy(part), total.chunk(SIZE, dim)[rank])
        assert torch.equal(torch.from_numpy(seen["sum"]), total)
        assert torch.equal(torch.from_numpy(seen["max"]), torch.stack(xs).amax(0))


@pytest.mark.parametrize("name", PAIRS)
def test_pair_in_a_group_of_one_is_the_identity(name):
    x = torch.ones(2, 3)
    assert PAIRS[name](x, Group((7,), 0)) is x


def test_plain_collectives_in_a_group_of_one_are_the_identity():
    x, one = torch.ones(2, 3), Group((7,), 0)
    assert all_reduce(x, one) is x and all_gather(x, one, 1) is x and reduce_scatter(x, one, 1) is x
