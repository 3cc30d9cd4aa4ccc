"""FusedAdamW alone: beside torch's AdamW step by step, its state dicts both ways with torch's and apex's, and its options."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalm_kernels import FusedAdamW
from megalm_kernels.rounding import join_fp32

BF16 = torch.bfloat16
SETTINGS: dict[str, Any] = dict(lr=1e-2, betas=(0.8, 0.9), eps=1e-6)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)


def groups(module: nn.Module) -> list[dict]:
    """Two groups, as training has them."""
    return [
        {"params": [p for p in module.parameters() if p.dim() == dim], "weight_decay": decay}
        for dim, decay in ((2, 0.1), (1, 0.0))
    ]


def run(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int, scale: float = 1.0) -> None:
    for step in range(first, first + count):
        for i, p in enumerate(module.parameters()):
            generator = torch.Generator().manual_seed(100 * step + i)
            p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)
        optimizer.step()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def apex_dict(optimizer: FusedAdamW) -> dict[str, Any]:
    """What apex's FusedAdam would have saved at this point: the step is the group's."""
    saved = copy.deepcopy(optimizer.state_dict())
    state = {i: {kind: s[kind] for kind in ("exp_avg", "exp_avg_sq")} for i, s in saved["state"].items()}
    keys = ("lr", "betas", "eps", "weight_decay", "params")
    steps = int(next(iter(saved["state"].values()))["step"])
    kept = [{**{key: g[key] for key in keys}, "bias_correction": True, "step": steps} for g in saved["param_groups"]]
    return {"state": state, "param_groups": kept}


def test_as_torch_does_it() -> None:
    ours, theirs = model(), model()
    run(ours, FusedAdamW(groups(ours), **SETTINGS), 0, 5)
    run(theirs, torch.optim.AdamW(groups(theirs), **SETTINGS), 0, 5)
    assert_same(ours, theirs)


@pytest.mark.parametrize("capturable", [False, True])
def test_state_goes_to_torch_and_back(capturable: bool) -> None:
    """Three steps here, three in torch, three here again: as nine in torch."""
    module, alone = model(), model()
    run(alone, torch.optim.AdamW(groups(alone), **SETTINGS), 0, 9)
    ours = FusedAdamW(groups(module), **SETTINGS, capturable=capturable)
    run(module, ours, 0, 3)
    theirs = torch.optim.AdamW(groups(module), lr=9.0)
    saved = copy.deepcopy(ours.state_dict())
    for group in saved["param_groups"]:
        group["capturable"] = False  # torch's wants a GPU
    theirs.load_state_dict(saved)
    assert theirs.param_groups[0]["lr"] == SETTINGS["lr"]
    run(module, theirs, 3, 3)
    ours = FusedAdamW(groups(module), lr=9.0, capturable=capturable)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert (ours.param_groups[0]["lr"], ours.param_groups[1]["betas"]) == (SETTINGS["lr"], SETTINGS["betas"])
    run(module, ours, 6, 3)
    assert_same(module, alone)


def test_state_comes_from_apex_and_goes_there() -> None:
    """By the format alone: apex cannot be installed on every machine that runs the tests."""
    module, alone = model(), model()
    run(alone, torch.optim.AdamW(groups(alone), **SETTINGS), 0, 6)
    first = FusedAdamW(groups(module), **SETTINGS)
    assert "step" not in first.state_dict()["param_groups"][0]
    run(module, first, 0, 3)
    second = FusedAdamW(groups(module), lr=9.0)
    second.load_state_dict(apex_dict(first))
    assert "step" not in second.param_groups[0]
    run(module, second, 3, 3)
    assert_same(module, alone)
    saved = second.state_dict()
    for group in saved["param_groups"]:  # where apex reads them
        assert (group["step"], group["bias_correction"], group["lr"]) == (6, True, SETTINGS["lr"])
    assert all(s["exp_avg"].dtype == torch.float32 for s in saved["state"].values())


@pytest.mark.parametrize(
    ("name", "value"), [("amsgrad", True), ("maximize", True), ("decoupled_weight_decay", False), ("bias_correction", False)]
)
def test_another_algorithm_is_refused(name: str, value: bool) -> None:
    module = model()
    optimizer = FusedAdamW(groups(module), **SETTINGS)
    saved = optimizer.state_dict()
    saved["param_groups"][0][name] = value
    with pytest.raises(ValueError, match=f"FusedAdamW: {name} in the state_dict is {value}, wanted {not value}"):
        optimizer.load_state_dict(saved)
    saved["param_groups"][0][name] = not value
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize("master", ["fp32", "remainder"])
def test_bf16_with_a_master_is_fp32_training(master: str) -> None:
    """The master moves as an fp32 parameter would; steps too small for bf16 add up."""
    low, wide = model(BF16), model(BF16).float()
    optimizer = FusedAdamW(groups(low), **{**SETTINGS, "lr": 1e-5}, master=master)
    oracle = torch.optim.AdamW(groups(wide), **{**SETTINGS, "lr": 1e-5})
    for step in range(4):
        for a, b in zip(low.parameters(), wide.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step)).to(BF16)
            b.grad = a.grad.float()
        optimizer.step()
        oracle.step()
    for a, b in zip(low.parameters(), wide.parameters(), strict=True):
        state = optimizer.state[a]
        whole = state["master"] if master == "fp32" else join_fp32(a.detach(), state["remainder"])
        torch.testing.assert_close(whole, b.detach(), rtol=1e-6, atol=1e-8)
        assert (a.float() - b).abs().max() <= 2**-8 * b.abs().max()


@pytest.mark.parametrize("master", ["none", "fp32", "remainder"])
@pytest.mark.parametrize("later", ["fp32", "remainder"])
def test_a_checkpoint_continues(master: str, later: str) -> None:
    """To the bit with the same kind of master; the other kind is made of it, and one that is not there of the parameters."""
    module = model(BF16)
    optimizer = FusedAdamW(groups(module), **SETTINGS, master=master)
    run(module, optimizer, 0, 3)
    other = copy.deepcopy(module)
    resumed = FusedAdamW(groups(other), lr=9.0, master=later)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kinds = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "step": torch.float32}
    kinds |= {"fp32": {"master": torch.float32}, "remainder": {"remainder": torch.int16}}[later]
    assert {key: x.dtype for key, x in resumed.state[next(other.parameters())].items()} == kinds
    assert resumed.param_groups[0]["master"] == later
    if master == "none":
        return
    run(module, optimizer, 3, 2)
    run(other, resumed, 3, 2)
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[a]["exp_avg"], resumed.state[b]["exp_avg"])
        wholes = []
        for p, state in ((a, optimizer.state[a]), (b, resumed.state[b])):
            wholes.append(state["master"] if "master" in state else join_fp32(p.detach(), state["remainder"]))
        assert torch.equal(*wholes)


def test_a_master_between_two_bf16_numbers_becomes_a_remainder() -> None:
    """The parameter was rounded to even, and its remainder needs it rounded away from zero."""
    parameter = nn.Parameter(torch.ones(4, dtype=BF16))
    one, other = FusedAdamW([parameter], master="fp32"), FusedAdamW([parameter], master="remainder")
    parameter.grad = torch.ones_like(parameter)
    one.step()
    saved = one.state_dict()
    saved["state"][0]["master"] = torch.full((4,), 1 + 2**-8)
    with torch.no_grad():
        parameter.fill_(1.0)
    other.load_state_dict(saved)
    assert torch.equal(join_fp32(parameter.detach(), other.state[parameter]["remainder"]), saved["state"][0]["master"])


def test_rounding_by_chance_adds_up() -> None:
    """Steps of a 50th of bf16's last bit: to the nearest nothing moves, by chance the mean does; and not all parameters alike."""
    moved = {}
    for by_chance in (False, True):
        parameters = [nn.Parameter(torch.ones(4000, dtype=BF16)) for _ in range(2)]
        optimizer = FusedAdamW(parameters, lr=2**-8 / 50, weight_decay=0.0, stochastic_rounding=by_chance, seed=3)
        for _ in range(20):
            for p in parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
        moved[by_chance] = 1 - parameters[0].float().mean().item()
        assert torch.equal(*parameters) is not by_chance
    assert moved[False] == 0.0
    assert abs(moved[True] / (20 * 2**-8 / 50) - 1) < 0.15


def test_grad_scaler_unscales_and_skips() -> None:
    """torch.amp's scaler leaves both to the optimizer, which does them without waiting; a skipped step is not counted."""
    ours, theirs = model(), model()
    optimizer, oracle = FusedAdamW(groups(ours), **SETTINGS), torch.optim.AdamW(groups(theirs), **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        scaler.scale(torch.ones(()))
        for i, (a, b) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(10 * step + i))
            a.grad, b.grad = scaler.get_scale() * grad, grad
        if step == 2:
            next(ours.parameters()).grad[0] = torch.inf  # type: ignore[index]
        else:
            oracle.step()
        before = next(ours.parameters()).grad.clone()  # type: ignore[union-attr]
        scaler.step(optimizer)
        assert torch.equal(next(ours.parameters()).grad, before), "the scaler made a pass over the gradients"
        scaler.update()
        assert_same(ours, theirs)
    assert all(int(state["step"]) == 3 for state in optimizer.state.values())


def test_scale_and_flag_of_the_caller() -> None:
    ours, theirs = model(), model()
    optimizer, oracle = FusedAdamW(groups(ours), **SETTINGS, capturable=True), torch.optim.AdamW(groups(theirs), **SETTINGS)
    unscaling = Stepping(optimizer, grad_scale=torch.tensor(0.25), found_inf=torch.zeros(()))
    run(ours, unscaling, 0, 3, scale=4.0)  # type: ignore[arg-type]
    run(theirs, oracle, 0, 3)
    assert_same(ours, theirs)
    run(ours, Stepping(optimizer, found_inf=torch.ones(())), 3, 1)  # type: ignore[arg-type]
    assert_same(ours, theirs)
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}


class Stepping:
    """An optimizer whose steps have these arguments."""

    def __init__(self, optimizer: FusedAdamW, **arguments: Tensor):
        self.optimizer, self.arguments = optimizer, arguments

    def step(self) -> None:
        self.optimizer.step(**self.arguments)


def test_learning_rate_as_a_tensor_and_a_closure() -> None:
    ours, theirs = model(), model()
    x = torch.randn(4, 5)
    optimizer = FusedAdamW(groups(ours), **{**SETTINGS, "lr": torch.tensor(1e-2)})
    oracle = torch.optim.AdamW(groups(theirs), **SETTINGS)

    def closure(module: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = module(x).square().sum()
        loss.backward()
        return loss

    losses = [o.step(lambda m=m, o=o: closure(m, o)) for m, o in ((ours, optimizer), (theirs, oracle))]
    assert torch.equal(*losses)
    assert_same(ours, theirs)


def test_a_parameter_with_gaps_and_one_without_a_gradient() -> None:
    """Transposed weights are stepped like others; what has no gradient is neither moved nor decayed."""
    stored = torch.randn(6, 4)
    ours, theirs = nn.Parameter(stored.clone().t()), nn.Parameter(stored.clone().t())
    idle = nn.Parameter(torch.ones(3))
    optimizer, oracle = FusedAdamW([ours, idle], **SETTINGS), torch.optim.AdamW([theirs], **SETTINGS)
    for p in (ours, theirs):
        p.grad = torch.arange(24.0).view(4, 6)
    optimizer.step()
    oracle.step()
    torch.testing.assert_close(ours, theirs)
    assert not ours.is_contiguous()
    assert torch.equal(idle, torch.ones(3)) and idle not in optimizer.state


def test_a_copy_keeps_its_options() -> None:
    module = model(BF16)
    optimizer = copy.deepcopy(FusedAdamW(module.parameters(), **SETTINGS, master="remainder"))
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert "remainder" in optimizer.state[p]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(master="bf16"), "master is bf16, wanted none or fp32 or remainder"),
        (dict(master="fp32", stochastic_rounding=True), "stochastic_rounding is True with master fp32"),
        (dict(lr=-1.0), "lr is -1.0, wanted at least 0"),
        (dict(eps=-1.0), "eps is -1.0"),
        (dict(weight_decay=-0.1), "weight_decay is -0.1"),
        (dict(betas=(0.9, 1.0)), r"betas is \(0.9, 1.0\)"),
        (dict(betas=(0.9,)), r"betas is \(0.9,\), wanted two"),
        (dict(betas=None), "betas is None, wanted two"),
        (dict(eps="1e-8"), "eps is of type str, wanted a number"),
        (dict(seed=-1), r"seed is -1, wanted at least 0 and less than 2\*\*64"),
        (dict(seed=2**64), "seed is 18446744073709551616"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"FusedAdamW: {message}"):
        FusedAdamW(model().parameters(), **options)


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (dict(master="fp32"), {}, "master of a param group is fp32, wanted none, as for the whole optimizer"),
        (dict(stochastic_rounding=True), {}, "stochastic_rounding of a param group is True, wanted False"),
        (dict(seed=3), dict(seed=2), "seed of a param group is 3, wanted 2"),
        (dict(capturable=True), {}, "capturable of a param group is True, wanted False"),
        (dict(lr=-1.0), {}, "lr of a param group is -1.0, wanted at least 0"),
        (dict(eps=-1.0), {}, "eps of a param group is -1.0"),
        (dict(weight_decay=-1.0), {}, "weight_decay of a param group is -1.0"),
        (dict(weight_decay=None), {}, "weight_decay of a param group is None, wanted a number"),
        (dict(betas=(1.0, 0.9)), {}, r"betas of a param group is \(1.0, 0.9\)"),
        (dict(params=list(model(torch.float16).parameters())), dict(master="remainder"), "parameter 0 .* is torch.float16"),
        (dict(params=list(model(torch.float64).parameters())), {}, "dtype of parameter 0 of a param group is torch.float64"),
    ],
)
def test_wrong_groups(group: dict, options: dict, message: str) -> None:
    """Refused before the first step, and not added."""
    with pytest.raises(ValueError, match=f"FusedAdamW: .*{message}"):
        FusedAdamW([{"params": model().parameters(), **group}], **options)
    optimizer = FusedAdamW(model().parameters(), **options)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": model().parameters(), **group})
    assert len(optimizer.param_groups) == 1


def test_groups_of_another_optimizer_with_the_same_options() -> None:
    """They say what this optimizer does anyway."""
    first = FusedAdamW(groups(model(BF16)), **SETTINGS, master="fp32")
    assert FusedAdamW(first.param_groups, master="fp32").param_groups[1]["betas"] == SETTINGS["betas"]


def test_nothing_to_round_by_chance() -> None:
    with pytest.warns(UserWarning, match="stochastic_rounding is True, but no parameter is bf16"):
        FusedAdamW(model().parameters(), stochastic_rounding=True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_state_of_another_optimizer_is_refused(momentum: float) -> None:
    module = model()
    theirs = torch.optim.SGD(module.parameters(), lr=0.1, momentum=momentum)
    run(module, theirs, 0, 1)
    ours = FusedAdamW(module.parameters(), **SETTINGS)
    wanted = "betas of a group of the state_dict is absent, wanted AdamW's: lr, betas, eps, weight_decay"
    if momentum:
        wanted = "exp_avg and exp_avg_sq and step of parameter 0 in the state_dict is absent, .* it has momentum_buffer"
    with pytest.raises(ValueError, match=f"FusedAdamW: {wanted}"):
        ours.load_state_dict(theirs.state_dict())
    run(module, ours, 0, 1)


def test_the_state_of_other_parameters_is_refused() -> None:
    module = model(BF16)
    optimizer = FusedAdamW(module.parameters(), **SETTINGS, master="fp32")
    run(module, optimizer, 0, 1)
    good = optimizer.state_dict()
    wrong: list[tuple[str, Any, str]] = [
        ("exp_avg", torch.zeros(5, 7), "the shape of exp_avg of parameter 2 in the state_dict is (5, 7), wanted (3, 7)"),
        ("exp_avg_sq", torch.zeros(21), "the shape of exp_avg_sq of parameter 2 in the state_dict is (21,), wanted (3, 7)"),
        ("master", torch.zeros(3), "the shape of master of parameter 2 in the state_dict is (3,), wanted (3, 7)"),
        ("exp_avg", [0.0], "exp_avg of parameter 2 in the state_dict is of type list, wanted a Tensor"),
    ]
    for name, value, message in wrong:
        saved = copy.deepcopy(good)
        saved["state"][2][name] = value
        with pytest.raises(ValueError, match=re.escape(f"FusedAdamW: {message}")):
            optimizer.load_state_dict(saved)
    saved = copy.deepcopy(good)
    saved["param_groups"][0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"FusedAdamW: lr in the state_dict is -1\.0"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == SETTINGS["lr"]
    optimizer.load_state_dict(good)


def test_a_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="gradient of a parameter is sparse, wanted dense"):
        FusedAdamW(embedding.parameters()).step()
