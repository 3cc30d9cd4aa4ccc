"""AdamW against torch's own and against the formula, over steps with gradients of very different sizes."""

from __future__ import annotations

import torch

from megalm.config.optim import OptimConfig
from megalm.optim.adam import build_optimizer
from megalm_kernels import FusedAdamW

CONFIG = OptimConfig(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6)


def gradients(step: int, shape: tuple[int, ...] = (7, 5)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=generator) * torch.logspace(-6, 2, 5)


def two_groups() -> list[dict]:
    torch.manual_seed(0)
    return [{"params": [torch.nn.Parameter(torch.randn(7, 5))], "weight_decay": decay} for decay in (0.1, 0.0)]


def test_as_torch_does_it() -> None:
    ours, theirs = two_groups(), two_groups()
    optimizers = [build_optimizer(ours, CONFIG), torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.9), eps=1e-6)]
    for step in range(10):
        for optimizer in optimizers:
            for i, group in enumerate(optimizer.param_groups):
                group["params"][0].grad, group["lr"] = gradients(step + 100 * i), 0.01 / (step + 1)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a["params"][0], b["params"][0], rtol=1e-5, atol=1e-7)


def test_the_formula() -> None:
    p = torch.nn.Parameter(torch.randn(7, 5))
    optimizer = FusedAdamW([p], lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    x, m, v = p.detach().double(), torch.zeros(7, 5).double(), torch.zeros(7, 5).double()
    for t in range(1, 6):
        p.grad = gradients(t)
        g = p.grad.double()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        x = x * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
    torch.testing.assert_close(p.detach().double(), x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), m, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"].double(), v, rtol=1e-5, atol=1e-9)


def test_the_state_is_all_that_it_remembers() -> None:
    """A checkpoint of `state` continues to the bit: nothing hides in the optimizer."""
    first = torch.nn.Parameter(torch.ones(7, 5))
    one = build_optimizer([{"params": [first], "weight_decay": 0.1}], CONFIG)
    for step in range(3):
        first.grad = gradients(step)
        one.step()
    second = torch.nn.Parameter(first.detach().clone())
    other = build_optimizer([{"params": [second], "weight_decay": 0.1}], CONFIG)
    other.state[second] = {key: value.clone() for key, value in one.state[first].items()}
    for optimizer, parameter in ((one, first), (other, second)):
        parameter.grad = gradients(3)
        optimizer.step()
    assert torch.equal(first, second)
    assert int(other.state[second]["step"]) == 4


def test_without_a_gradient_nothing_moves() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    FusedAdamW([p], lr=1.0, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.5).step()
    assert torch.equal(p, torch.ones(3))
