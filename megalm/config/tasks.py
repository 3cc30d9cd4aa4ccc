"""The configurations of the verbs that are not a training run."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.data import PrepareConfig
from megalm.config.knobs import knob, section


@dataclass
class PrepareRun:
    """Root of `megalm prepare`."""

    prepare: PrepareConfig = section(PrepareConfig)


@dataclass
class GenerateConfig:
    """Continue a prompt with a trained model, on one process."""

    checkpoint: str = knob("runs/pretrain", "checkpoint folder, or a run folder (its latest)")
    tokenizer: str = knob("", "tokenizer.json; empty: the one the run was trained with")
    prompt: str = knob("def ", "text to continue", empty=False)
    max_tokens: int = knob(128, "tokens to add", minimum=1)
    samples: int = knob(1, "continuations to draw", minimum=1)
    greedy: bool = knob(False, "always the likeliest token; temperature, top_k and top_p have no effect then")
    temperature: float = knob(0.8, "flattens (above 1) or sharpens (below 1) the distribution", above=0.0)
    top_k: int = knob(0, "draw from the k likeliest tokens only; 0: all", minimum=0)
    top_p: float = knob(
        0.95, "draw from the likeliest tokens that together have this probability", above=0.0, maximum=1.0
    )
    seed: int = knob(0, "of the draws", minimum=0)
    device: str = knob("auto", "auto: cuda where there is a GPU, else cpu", allowed=("auto", "cpu", "cuda"))


@dataclass
class GenerateRun:
    """Root of `megalm generate`."""

    generate: GenerateConfig = section(GenerateConfig)


@dataclass
class DoctorConfig:
    """Look at this machine and say what is missing."""

    output: str = knob("text", "how to print", allowed=("text", "json"))


@dataclass
class DoctorRun:
    """Root of `megalm doctor`."""

    doctor: DoctorConfig = section(DoctorConfig)
