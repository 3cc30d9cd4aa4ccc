"""Mixture of experts on one rank: the block against its formula, token by token, and every way a router can be set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megalm.config.model import ModelConfig
from megalm.models.moe import MoE
from megalm.models.router import AUX, DROPPED, ENTROPY, TOKENS, Router, Z, choose, routers_of
from megalm_kernels import dispatch

SIZE, INNER = 12, 10
SHAPE = (2, 7)  # of tokens
SETTINGS: dict[str, dict] = {
    "mixtral": {},
    "one": {"experts_per_token": 1, "router_normalize": False},
    "all": {"experts_per_token": 5},
    "deepseek": {
        "router_score": "sigmoid", "router_scale": 2.5, "experts_per_token": 3, "num_shared_experts": 2
    },
    "plain": {"router_normalize": False, "num_shared_experts": 1},
    "capacity": {"capacity_factor": 0.75},
    "capacity of one": {"capacity_factor": 0.01, "router_score": "sigmoid", "router_normalize": False},
    "losses": {"router_aux_loss": 0.5, "router_z_loss": 0.25, "capacity_factor": 1.0},
    "sigmoid losses": {"router_aux_loss": 0.5, "router_z_loss": 0.25, "router_score": "sigmoid"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def torch_kernels() -> None:
    dispatch.choose("torch", "cpu")


def build_moe(**changes: object) -> MoE:
    """fp64, so that the formula's other order of sums does not matter."""
    settings = {"num_experts": 5, "expert_ffn_size": INNER, **changes}
    moe = MoE(ModelConfig(hidden_size=SIZE, num_heads=2, **settings)).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in moe.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
        moe.router.balance.copy_(torch.randn(moe.router.balance.shape, generator=generator) * 0.2)
    return moe


def tokens() -> Tensor:
    return torch.randn(*SHAPE, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))


def formula(moe: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and losses, one token at a time, each choice made by Python's own sort."""
    c, experts, router = moe.router.config, moe.experts, moe.router
    taken, slots, outputs = [0] * c.num_experts, [0] * c.num_experts, []
    flat = x.flatten(0, 1)
    capacity = math.ceil(c.capacity_factor * len(flat) * c.experts_per_token / c.num_experts) if c.capacity_factor else 10**9
    probabilities, z = [], []
    for token in flat:
        logits = router.weight @ token
        scores = torch.softmax(logits, 0) if c.router_score == "softmax" else torch.sigmoid(logits)
        probabilities.append(scores / scores.sum())
        z.append(torch.logsumexp(logits, 0) ** 2)
        judged = [(-(scores[e] + router.balance[e]).item(), e) for e in range(c.num_experts)]
        chosen = [e for _, e in sorted(judged)[: c.experts_per_token]]
        total = sum(scores[e] for e in chosen) if c.router_normalize else 1.0
        y = torch.zeros_like(token)
        for e in chosen:
            slots[e] += 1
            if taken[e] < capacity:
                taken[e] += 1
                y = y + c.router_scale * scores[e] / total * swiglu(token, experts.gate[e], experts.up[e], experts.down[e])
        if moe.shared is not None:
            y = y + swiglu(token, moe.shared.gate.weight, moe.shared.up.weight, moe.shared.down.weight)
        outputs.append(y)
    mean = torch.stack(probabilities).mean(0)
    aux = c.num_experts * sum(n / sum(slots) * mean[e] for e, n in enumerate(slots))
    losses = c.router_aux_loss * aux + c.router_z_loss * torch.stack(z).mean()
    return torch.stack(outputs).view_as(x), losses


@pytest.mark.parametrize("name", SETTINGS)
def test_block_and_every_gradient_are_the_formulas(name: str) -> None:
    moe, x = build_moe(**SETTINGS[name]), tokens()
    moe.router.loss_scale = 3.0
    weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    named = {"x": x, **dict(moe.named_parameters())}
    found = torch.autograd.grad((moe(x) * weights).sum(), [*named.values()])
    y, losses = formula(moe, x)
    wanted = torch.autograd.grad((y * weights).sum() + 3.0 * losses, [*named.values()])
    torch.testing.assert_close(moe(x), y)
    for key, mine, theirs in zip(named, found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, key=key: f"{key}: {text}")
        assert key in ("experts.gate", "experts.up", "experts.down") or mine.abs().max() > 1e-3, f"{key}'s gradient shows nothing"


def test_capacity_drops_the_last_tokens_and_only_in_training() -> None:
    moe, x = build_moe(experts_per_token=1, num_experts=2, capacity_factor=0.5), tokens()
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.balance.copy_(torch.tensor([0.0, -1.0]))  # all go to the first
    y = moe(x).flatten(0, 1)
    assert (y[:4].abs().amax(1) > 0).all() and (y[4:] == 0).all()  # 14 tokens, 2 experts: ceil(0.5 x 7)
    assert (moe.eval()(x).abs().amax(-1) > 0).all()


def test_an_expert_without_tokens_has_gradients_of_zero() -> None:
    moe, x = build_moe(), tokens()
    with torch.no_grad():
        moe.router.balance[3] = -10.0
    moe(x).sum().backward()
    for p in moe.experts.parameters():
        assert p.grad is not None
        assert (p.grad[3] == 0).all() and (p.grad[[0, 1, 2, 4]].flatten(1).abs().amax(1) > 0).all()


def test_of_equal_scores_the_lower_expert_is_taken() -> None:
    assert choose(torch.zeros(3, 70), 3).tolist() == [[0, 1, 2]] * 3
    assert choose(torch.tensor([[0.5, 2.0, 0.5, 2.0, 1.0]]), 4).tolist() == [[1, 3, 4, 0]]


def test_even_loads_have_an_auxiliary_loss_of_one_and_the_tally_tells_of_them() -> None:
    router = Router(ModelConfig(hidden_size=4, num_heads=1, num_experts=4, experts_per_token=2))
    router.watched = True
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    x = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]], requires_grad=True)[None]
    router(x)[1].sum().backward()
    tally = router.take_tally()
    assert tally[:4].tolist() == [1, 1, 1, 1]
    assert tally[4 + AUX].item() == pytest.approx(1.0)
    p = x[0].detach().softmax(-1)
    assert tally[4 + ENTROPY].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-6)
    assert tally[4 + Z].item() == pytest.approx(x[0].detach().logsumexp(-1).square().mean().item(), rel=1e-6)
    assert (tally[4 + TOKENS].item(), tally[4 + DROPPED].item()) == (2, 0)
    assert (router.take_tally() == 0).all(), "taken twice"


def test_a_repeated_forward_and_an_evaluation_count_nothing() -> None:
    moe, x = build_moe(capacity_factor=0.5), tokens()
    torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False).sum().backward()
    moe(x)
    moe.eval()(x).sum().backward()
    tally = moe.router.take_tally()
    assert tally[:5].sum() == 2 * 14 and tally[5 + TOKENS] == 14
    kept, _ = moe.train().router(x)
    assert tally[5 + DROPPED] == (kept == 5).sum() > 0


def test_biases_move_against_the_loads_and_change_the_choice_alone() -> None:
    moe, x = build_moe(router_balance_rate=0.25), tokens()
    router = moe.router
    before = router.balance.clone()
    router.update_balance(torch.tensor([4.0, 1, 0, 5, 2.5], dtype=torch.float64))  # the mean is 2.5
    torch.testing.assert_close(router.balance - before, torch.tensor([-0.25, 0.25, 0.25, -0.25, 0.0]))
    with torch.no_grad():
        router.balance.fill_(7.0)
    shifted = router(x)
    with torch.no_grad():
        router.balance.zero_()
    for a, b in zip(shifted, router(x), strict=True):
        assert torch.equal(a, b), "the weights must not have the biases in them"


def test_casts_leave_the_biases_as_they_are() -> None:
    moe = build_moe().bfloat16()
    assert moe.router.weight.dtype == torch.bfloat16 and moe.router.balance.dtype == torch.float32
    assert torch.equal(moe.router.balance, build_moe().router.balance)
    with torch.device("meta"):
        empty = MoE(moe.router.config).bfloat16()
    assert empty.to_empty(device="cpu").router.balance.dtype == torch.float32


def test_first_layers_are_dense_and_each_expert_has_a_value_of_its_own(build, tokens) -> None:
    model = build(num_experts=4, expert_ffn_size=16, num_dense_layers=1, num_shared_experts=1)
    assert sorted(routers_of(torch.nn.ModuleList([model]))) == [1, 2]
    down = model.get_parameter("layers.1.mlp.experts.down")
    assert len({tuple(expert.flatten().tolist()) for expert in down}) == 4
    inner = model.get_parameter("layers.1.mlp.experts.up")
    residual = [down, model.get_parameter("layers.2.mlp.shared.down.weight")]
    assert all(p.std().item() == pytest.approx(0.3 / math.sqrt(6), rel=0.15) for p in residual)
    assert inner.std().item() == pytest.approx(0.3, rel=0.1)
    assert model(tokens).isfinite().all()
