"""Stages of any split compute what one rank computes, also those without a layer."""

from __future__ import annotations

import pytest
import torch

from megalm.config.model import ModelConfig
from megalm.models.registry import build_model
from megalm.parallel.stages import apply_stage
from megalm.testing import run_distributed
from tests.parallel.tiny import alone, difference_from_whole, tiny_config, train

CASES = [("0,3", 1, "1f1b", False), ("3,0", 1, "1f1b", True), ("0,2,1,0", 2, "zbv", False)]


def _differences(rank: int, size: int) -> list[tuple[str, float, float]]:
    """By split: the largest differences of losses (where the last stage is) and of weights from one rank's."""
    found = []
    wholes = {tied: train(tiny_config("gpt", tied=tied, layers=3, batch=4), alone()) for tied in (False, True)}
    for split, chunks, schedule, tied in CASES:
        layout = {"pipeline_parallel": 2, "chunks": chunks, "schedule": schedule, "stage_split": split}
        trained = train(tiny_config("gpt", tied=tied, layers=3, batch=4, **layout))
        losses = max(abs(a - b) for a, b in zip(trained.losses, wholes[tied].losses, strict=True))
        found.append((split, losses if any(trained.losses) else 0.0, difference_from_whole(trained, wholes[tied].weights())))
    return found


@pytest.mark.dist
def test_uneven_and_empty_stages_train_like_one_rank() -> None:
    first, second = run_distributed(_differences, 2)
    assert [split for split, _, _ in first] == [case[0] for case in CASES]
    for split, losses, weights in first + second:
        assert losses < 1e-5 and weights < 1e-5, (split, losses, weights)


def test_a_stage_has_its_layers_under_their_own_numbers() -> None:
    with torch.device("meta"):
        models = [build_model(ModelConfig(num_layers=4)) for _ in range(3)]
    for stage, model in enumerate(models):
        apply_stage(model, stage, [0, 3, 1])
    assert [list(model.layers) for model in models] == [[], ["0", "1", "2"], ["3"]]
    assert [model.embedding is not None for model in models] == [True, False, False]
    assert [model.head is not None for model in models] == [False, False, True]


def test_a_split_of_another_model() -> None:
    with torch.device("meta"), pytest.raises(AssertionError, match="not a split of 4 layers"):
        apply_stage(build_model(ModelConfig(num_layers=4)), 0, [2, 1])
