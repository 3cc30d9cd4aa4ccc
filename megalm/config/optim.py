"""The optimizer and the learning rate over time."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.knobs import knob

LR_SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt", "wsd")


@dataclass
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019) and its schedule."""

    lr: float = knob(3e-4, "peak learning rate", above=0.0)
    min_lr: float = knob(3e-5, "learning rate at the end of the decay", minimum=0.0)
    schedule: str = knob(
        "cosine", "shape of the learning rate after warm-up; wsd: warm-up, stable, decay", allowed=LR_SCHEDULES
    )
    warmup_steps: int = knob(0, "steps of linear warm-up from 0", minimum=0)
    decay_steps: int = knob(0, "step at which min_lr is reached; 0: train.steps", minimum=0)
    wsd_decay_steps: int = knob(0, "length of wsd's final decay, steps; 0: a tenth of decay_steps", minimum=0)
    weight_decay: float = knob(0.1, "decoupled weight decay on matrices; none on biases, norms and scales", minimum=0.0)
    beta1: float = knob(0.9, "decay of the first moment", minimum=0.0, maximum=0.9999999)
    beta2: float = knob(0.95, "decay of the second moment", minimum=0.0, maximum=0.9999999)
    eps: float = knob(1e-8, "added to the root of the second moment", above=0.0)
    clip: float = knob(1.0, "largest global gradient norm; 0: no clipping", minimum=0.0)
