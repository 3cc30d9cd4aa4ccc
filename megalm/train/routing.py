"""What the routers did: every step their biases are moved, every `log_every` steps the experts' loads are told."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megalm.log import log
from megalm.models.router import AUX, DROPPED, ENTROPY, TALLIED, TOKENS, Z
from megalm.parallel.collectives import all_reduce
from megalm.train.hooks import Logging
from megalm.train.trainer import Hook, StepResult, Trainer


class Routing(Hook):
    """Every step: move the balance biases; every `log_every`: loads, dropped tokens and entropy, to metrics.jsonl and console.

    The numbers are sums over the step's global batch, so they are the same on every layout, and so are the biases.
    """

    def __init__(self, logging: Logging):
        self.logging = logging

    def on_start(self, trainer: Trainer) -> None:
        self.routers = trainer.job.routers

    def before_step(self, trainer: Trainer) -> None:
        config, step = trainer.config.train, trainer.state.step + 1
        self.watched = step % config.log_every == 0 or step == config.steps
        for router in self.routers.values():
            router.watched = self.watched

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        model, topology = trainer.config.model, trainer.topology
        tallies = [router.take_tally() for router in self.routers.values()]
        if not (self.watched or model.router_balance_rate):
            return
        sums = all_reduce(torch.stack(tallies), topology.data) if tallies else None
        if sums is not None and model.router_balance_rate and not result.skipped:
            for router, tally in zip(self.routers.values(), sums, strict=True):
                router.update_balance(tally[: model.num_experts])
        if self.watched:
            layers = torch.zeros(model.num_layers, model.num_experts + TALLIED, dtype=torch.float64, device=topology.device)
            if sums is not None:
                layers[list(self.routers)] = sums
            self._tell(trainer, all_reduce(layers, topology.pipeline))

    def _tell(self, trainer: Trainer, layers: Tensor) -> None:
        config = trainer.config
        record = describe(layers, config.model.experts_per_token, config.train.global_batch_size // config.train.micro_batch_size)
        self.logging.write({"step": trainer.state.step, **record})
        dropped = f"{record['moe_dropped']:.1%} dropped, " if config.model.capacity_factor else ""
        log(
            f"step {trainer.state.step:>6}  experts get {record['moe_min_load']:.2f} to {record['moe_max_load']:.2f} of their "
            f"even share (most in layer {record['moe_worst_layer']})  {dropped}router entropy {record['moe_entropy']:.2f} of "
            f"{math.log(config.model.num_experts):.2f} nats"
        )


def describe(layers: Tensor, experts_per_token: int, microbatches: int) -> dict[str, Any]:
    """A line of metrics.jsonl from the sums of one step, (layers, N + TALLIED); layers without experts are all zeros.

    Loads are shares of the mean load, before capacity drops any; entropies are means over tokens, in nats.
    """
    found: dict[int, dict[str, Any]] = {}
    for layer, row in enumerate(layers.tolist()):  # sync
        loads, sums = row[:-TALLIED], row[-TALLIED:]
        if tokens := sums[TOKENS]:
            slots = tokens * experts_per_token
            found[layer] = {
                "load": [round(load * len(loads) / slots, 4) for load in loads],
                "dropped": sums[DROPPED] / slots,
                "entropy": sums[ENTROPY] / tokens,
                "aux_loss": sums[AUX] / microbatches,
                "z_loss": sums[Z] / microbatches,
            }
    worst = max(found, key=lambda layer: max(found[layer]["load"]))
    means = {key: sum(of[key] for of in found.values()) / len(found) for key in ("dropped", "entropy", "aux_loss", "z_loss")}
    return {
        "moe_max_load": max(found[worst]["load"]),
        "moe_min_load": min(min(of["load"]) for of in found.values()),
        "moe_worst_layer": worst,
        **{f"moe_{key}": value for key, value in means.items()},
        "moe_layers": found,
    }
