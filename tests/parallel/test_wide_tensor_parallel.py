"""Tensor parallelism over 16, 32 and 64 ranks computes what one rank does: loss and every gradient, in one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.models.layers import Dropout
from megalm.models.plans import PLANS
from megalm.models.registry import build_model
from megalm.objectives.language_modeling import causal_loss
from megalm.parallel.tensor_parallel import apply_tensor_parallel, local_slice, shard_of, sum_partial_gradients
from megalm.parallel.topology import Topology
from megalm.parallel.weight_gradients import WeightGradients
from tests.parallel.simulated import simulate  # noqa: F401  a fixture
from tests.parallel.tiny import alone

SEQ_LENGTH, VOCAB = 64, 331  # 331 is prime: no width divides it, and at 64 the last eight ranks hold padding only
CASES = [
    ("llama", 16, True, False),
    ("gpt", 16, False, True),
    ("llama", 32, False, True),
    ("gpt", 32, True, False),
    ("llama", 64, True, True),
    ("gpt", 64, True, True),
    ("gpt", 64, False, False),
]  # architecture, width, sequence parallel, tied embeddings
IDS = [f"{a}-tp{n}{'_sp' if s else ''}{'-tied' if t else ''}" for a, n, s, t in CASES]


def model_config(architecture: str, tied: bool) -> ModelConfig:
    """64 query heads and 4 key/value heads, so that up to 16 ranks hold copies of one."""
    return ModelConfig(
        architecture, VOCAB, hidden_size=48, num_layers=2, num_heads=64, num_kv_heads=4, head_dim=4, ffn_size=128,
        max_seq_length=SEQ_LENGTH, tie_embeddings=tied, dropout=0.1,
    )  # fmt: skip


def whole_model(config: ModelConfig) -> nn.Module:
    model = build_model(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.dim() == 1))
    return model


def loss_and_gradients(model: nn.Module, topology: Topology) -> tuple[float, dict[str, Tensor]]:
    """One forward and backward, with dropout; gradients are complete."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.seed = 11
    tokens = torch.randint(VOCAB, (2, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(1))
    labels = tokens[:, 1:].clone()
    labels[0, :5] = -100
    labels[1, 0] = VOCAB - 1
    logits = model(tokens[:, :-1], samples=torch.tensor([3, 8]))
    loss = causal_loss(logits, labels, topology.tensor, VOCAB)
    loss.backward()
    partial = [p for p in model.parameters() if shard_of(p).is_partial]
    sum_partial_gradients(partial, [p.grad for p in partial], topology.tensor)  # type: ignore[misc]
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}  # type: ignore[misc]


def split_run(config: ModelConfig, whole: dict[str, Tensor], topology: Topology, overlap: bool) -> dict:
    """The same on one of the ranks, which holds its slices of the whole weights."""
    model = build_model(config)
    queue = WeightGradients(overlap=True) if overlap else None
    apply_tensor_parallel(model, PLANS[config.architecture], topology, queue)
    model.tie()
    for name, p in model.named_parameters():
        p.data.copy_(local_slice(p, tuple(p.shape), whole[name]))
    loss, gradients = loss_and_gradients(model, topology)
    return {"loss": loss, "gradients": gradients, "parameters": dict(model.named_parameters())}


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_wide_groups_compute_what_one_rank_does(case, simulate) -> None:  # noqa: F811
    architecture, size, sequence_parallel, tied = case
    config = model_config(architecture, tied)
    whole = whole_model(config)
    wanted_loss, wanted = loss_and_gradients(whole, alone())
    weights = {name: p.detach() for name, p in whole.named_parameters()}
    ranks = simulate(size, sequence_parallel, lambda topology: split_run(config, weights, topology, overlap=tied))
    held = dict.fromkeys(wanted, 0)
    for seen in ranks:
        assert seen["loss"] == pytest.approx(wanted_loss, rel=2e-6)
        assert seen["gradients"].keys() == wanted.keys()
        for name, gradient in seen["gradients"].items():
            p, scale = seen["parameters"][name], float(wanted[name].abs().max())
            expected = local_slice(p, tuple(p.shape), wanted[name])
            tolerance = 1e-3 if name.endswith("k.bias") else 1e-5 * scale  # of the key biases it is rounding alone
            assert float((gradient - expected).abs().max()) <= tolerance, name
            held[name] += shard_of(p).real(p).numel() / shard_of(p).copies
    split = [name for name, p in ranks[0]["parameters"].items() if shard_of(p).dim is not None]
    assert {name: held[name] for name in split} == {name: weights[name].numel() for name in split}, "every row exactly once"
    assert len(split) >= 15 if architecture == "llama" else 22
