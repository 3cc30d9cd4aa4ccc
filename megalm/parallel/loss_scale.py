"""The loss scale of fp16: small gradients are lifted into the range of the numbers, and a step that leaves it is skipped.

One policy for every engine: halve on overflow, double after `window` steps without one (Micikevicius et al. 2018). All ranks
decide together (the engines reduce the overflow over all ranks of the model), so all of them hold the same scale.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LossScale:
    """What the loss is multiplied with before the backward."""

    scale: float
    window: int  # clean steps after which the scale doubles
    clean_steps: int = 0  # since the last overflow or doubling

    def update(self, overflow: bool) -> None:
        """After each step, done or skipped."""
        if overflow:
            self.scale, self.clean_steps = self.scale / 2, 0
            return
        self.clean_steps += 1
        if self.clean_steps == self.window:
            self.scale, self.clean_steps = self.scale * 2, 0
