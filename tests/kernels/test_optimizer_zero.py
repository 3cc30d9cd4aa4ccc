"""FusedAdamW as DeepSpeed's client optimizer, used as DeepSpeed's own documentation does: ZeRO 1, 2, 3 beside torch's AdamW."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalm.parallel.zero_config import import_deepspeed
from megalm.testing import run_distributed
from megalm_kernels import FusedAdamW

pytestmark = pytest.mark.dist
SETTINGS: dict[str, Any] = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6)
STEPS = 4
CASES = list(product((1, 2, 3), (torch.float32, torch.bfloat16)))


def model() -> nn.Module:
    """Odd sizes, so that every flat buffer is padded."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def groups(module: nn.Module) -> list[dict]:
    return [{"params": [p for p in module.parameters() if p.dim() == d], "weight_decay": w} for d, w in ((2, 0.1), (1, 0.0))]


def batch(step: int) -> Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step))


def train_with_deepspeed(
    kind: type[torch.optim.Optimizer], stage: int, dtype: torch.dtype, rank: int, size: int
) -> dict[str, Tensor]:
    """fp32 weights and first moments after some steps, on this rank's part of each batch."""
    deepspeed = import_deepspeed()
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    module = model().to(dtype)
    names = dict(module.named_parameters())
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8 // size,
        "gradient_clipping": 0.5,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
    }
    if stage == 3:
        config["zero_optimization"]["memory_efficient_linear"] = False
    if dtype == torch.bfloat16:
        config |= {"bf16": {"enabled": True}, "communication_data_type": "fp32"}
    engine = deepspeed.initialize(model=module, optimizer=kind(groups(module), **SETTINGS), config=config)[0]
    for step in range(STEPS):
        out = engine(batch(step).chunk(size)[rank].to(dtype))
        engine.backward(out.float().square().mean())
        engine.step()
    found = {f"weight/{name}": safe_get_full_fp32_param(p) for name, p in names.items()}
    first_group = [name for name in names if name.endswith("weight")]  # of the others DeepSpeed links no moments
    return found | {f"exp_avg/{name}": safe_get_full_optimizer_state(names[name], "exp_avg") for name in first_group}


def train_everywhere(rank: int, size: int) -> list[tuple[dict[str, Tensor], ...]]:
    return [
        tuple(train_with_deepspeed(kind, stage, dtype, rank, size) for kind in (FusedAdamW, torch.optim.AdamW))
        for stage, dtype in CASES
    ]


@pytest.fixture(scope="module")
def trained() -> list[tuple[dict[str, Tensor], ...]]:
    return run_distributed(train_everywhere, 2)[0]


@pytest.mark.parametrize("case", CASES)
def test_equals_torchs_adamw_under_deepspeed(trained: list, case: tuple) -> None:
    ours, theirs = trained[CASES.index(case)]
    start = dict(model().named_parameters())
    for key, want in theirs.items():
        torch.testing.assert_close(ours[key], want, rtol=1e-6, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")
        if key.startswith("weight/"):
            assert (ours[key] - start[key.removeprefix("weight/")]).abs().max() > 0.02  # four steps of 0.01


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_equals_torchs_adamw_on_one_process(trained: list, stage: int) -> None:
    module = model()
    optimizer = torch.optim.AdamW(groups(module), **SETTINGS)
    for step in range(STEPS):
        optimizer.zero_grad()
        module(batch(step)).square().mean().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
    ours, _ = trained[CASES.index((stage, torch.float32))]
    for name, want in module.named_parameters():
        torch.testing.assert_close(ours[f"weight/{name}"], want.detach(), rtol=1e-4, atol=1e-5)
