"""The learning rate as a function of the step: warm-up, then one of five shapes."""

from __future__ import annotations

import math

from megalm.config.optim import OptimConfig


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0 is the first). After the decay it stays at `min_lr`.

    warm-up: (step + 1) / warmup_steps of the peak, so that the first step already learns;
    cosine, linear: from the peak to min_lr at decay_steps; constant: the peak; inverse_sqrt: peak sqrt(w / step) (Vaswani
    et al. 2017), not below min_lr; wsd: the peak, then linear to min_lr over the last wsd_decay_steps (Hu et al. 2024).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    end = config.decay_steps or total_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "inverse_sqrt":
        start = max(1, config.warmup_steps)
        return max(config.min_lr, config.lr * math.sqrt(start / max(step + 1, start)))
    begin = config.warmup_steps
    if config.schedule == "wsd":
        begin = max(begin, end - (config.wsd_decay_steps or max(1, end // 10)))
    progress = min(1.0, max(0.0, (step - begin) / max(1, end - begin)))
    falling = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.min_lr + (config.lr - config.min_lr) * falling
