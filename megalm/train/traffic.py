"""What a configuration sends in a step, on every rank: the model's shapes and plan meet the formulae. Without torch."""

from __future__ import annotations

from megalm.config.run import RunConfig
from megalm.models.plans import PLANS
from megalm.models.shapes import stage_shapes
from megalm.parallel.actions import Schedule
from megalm.parallel.split import layers_of_stage
from megalm.parallel.volume import Volume, predict
from megalm.parallel.volume_parts import Part, cut
from megalm.train.forecast import layers_per_stage


def parts_of_rank(config: RunConfig, schedule: Schedule, rank: int) -> dict[int, list[Part]]:
    """By stage, the parameters of one pipeline rank as each of its tensor parallel ranks holds them."""
    split, plan = layers_per_stage(config, schedule.num_stages), PLANS[config.model.architecture]
    stages, last = schedule.stages_of(rank), schedule.num_stages - 1
    parts = {}
    for stage in stages:
        shapes = stage_shapes(config.model, layers_of_stage(stage, split), stage == 0, stage == last)
        if config.model.tie_embeddings and stage == last > 0 and 0 in stages:
            del shapes["head.weight"]  # the embedding's, which is here too
        parts[stage] = cut(shapes, plan, config)
    return parts


def forecast_volume(config: RunConfig, schedule: Schedule, rank: int) -> Volume:
    """What one optimizer step sends on pipeline rank `rank`."""
    return predict(config, schedule, rank, parts_of_rank(config, schedule, rank))
