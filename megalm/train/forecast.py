"""What follows from a configuration before anything runs, without torch: layers per stage."""

from __future__ import annotations

from megalm.config.run import RunConfig
from megalm.config.stage_split import AUTO, explicit_split
from megalm.parallel.split import even_split


def layers_per_stage(config: RunConfig, num_stages: int) -> list[int]:
    """Layers of each stage along the model, as `parallel.stage_split` says; one stage has them all."""
    layers, wanted = config.model.num_layers, config.parallel.stage_split
    if num_stages == 1:
        return [layers]
    if wanted == AUTO:
        return even_split(layers, num_stages)
    return list(explicit_split(wanted) or even_split(layers, num_stages))
