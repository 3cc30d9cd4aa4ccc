"""Latent attention split over ranks: what lies whole inside the split region gets parts of gradients, which add up."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from megalm.config.model import ModelConfig
from megalm.config.run import RunConfig
from megalm.parallel.weight_gradients import WeightGradients
from megalm.testing import run_distributed
from tests.parallel.test_tensor_parallel import compare_models
from tests.parallel.tiny import VOCAB, alone, difference_from_whole, tiny_config, train

LATENT = {"head_dim": 6, "kv_latent_size": 12, "rope_head_dim": 2, "value_head_dim": 5}
INSIDE = ("q_down", "q_norm", "kv_down", "kv_norm")


def latent_config(q_latent: int = 0, **parallel) -> RunConfig:
    config = tiny_config(layers=2, **parallel)
    config.model = ModelConfig(
        "llama", VOCAB, 32, 2, 8, ffn_size=48, max_seq_length=16, init_std=0.2, q_latent_size=q_latent, **LATENT
    )
    return config


CASES = list(itertools.product((False, True), (0, 10), (False, True)))  # sequence parallel, queries' latent, overlap
TRAINED = ({"sequence_parallel": False}, {"sequence_parallel": True, "zero": 3})


def compare_all(rank: int, world_size: int, folder: str) -> dict:
    found = {}
    for sequence_parallel, q_latent, overlap in CASES:
        config = latent_config(q_latent, tensor_parallel=2, sequence_parallel=sequence_parallel)
        queue = WeightGradients(overlap=True) if overlap else None
        found[sequence_parallel, q_latent, overlap] = compare_models(config, queue)
    whole = torch.load(Path(folder) / "whole.pt")
    trained = [train(latent_config(10, tensor_parallel=2, **parallel)) for parallel in TRAINED]
    return {"compared": found, "weights": [difference_from_whole(t, whole) for t in trained],
            "norms": [t.norms for t in trained]}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A short run on one rank: the folder with its weights, and its gradients' norms."""
    folder, trained = tmp_path_factory.mktemp("latent"), train(latent_config(10), alone())
    torch.save(trained.weights(), folder / "whole.pt")
    return folder, trained.norms


@pytest.mark.dist
def test_two_ranks_compute_what_one_does(whole: tuple[Path, list[float]]) -> None:
    folder, norms = whole
    for seen in run_distributed(compare_all, 2, str(folder)):
        for case, result in seen["compared"].items():
            check_split(case, result)
        assert max(seen["weights"]) < 1e-4
        for found in seen["norms"]:
            assert found == pytest.approx(norms, rel=1e-5)


def check_split(case: tuple[bool, int, bool], result: dict) -> None:
    sequence_parallel, q_latent, _ = case
    assert result["names"] and result["drawn"] == [], case
    assert result["logits"] < 2e-6 and result["loss"] < 1e-6, case
    assert {name: error for name, error in result["gradients"].items() if not error < 1e-5} == {}, case
    inside = {name for name in result["gradients"] if name.split(".")[-2] in INSIDE}
    assert len(inside) == 2 * (4 if q_latent else 2)
    assert inside <= set(result["partial"])
    assert bool(set(result["partial"]) - inside) is sequence_parallel, "the norms between regions, only with slices"
    assert result["partial alone"] > 1e-2  # without the sum they would be wrong
    columns = {name for name in result["split"] if "attention." in name and name.split(".")[-2] != "out"}
    assert {name.split(".")[-2] for name in columns} == {"q_up" if q_latent else "q", "kv_up"}
