"""`parallel.stage_split` as a user writes it (even, auto, or 3,5,5,3), and the rules that it must obey."""

from __future__ import annotations

import re
from collections.abc import Callable

from megalm.config.fixes import Change, Rule
from megalm.config.run import RunConfig

EVEN, AUTO = "even", "auto"
_KEY, _LAYERS = "parallel.stage_split", "model.num_layers"
_PP, _CHUNKS = "parallel.pipeline_parallel", "parallel.chunks"


def explicit_split(text: str) -> tuple[int, ...] | None:
    """`3,5,5,3` -> layers of each stage along the model; None if it is not numbers."""
    parts = [part.strip() for part in text.split(",")]
    return tuple(map(int, parts)) if all(re.fullmatch("[0-9]{1,6}", part) for part in parts) else None


def num_stages(config: RunConfig) -> int:
    """Stages along the model: chunks on all ranks of the pipeline."""
    return config.parallel.pipeline_parallel * config.parallel.chunks


def _obeys(holds: Callable[[tuple[int, ...], RunConfig], bool]) -> Callable[[RunConfig], bool]:
    """Whether an explicit split obeys; even and auto always do."""
    return lambda c: (split := explicit_split(c.parallel.stage_split)) is None or holds(split, c)


def _changes(c: RunConfig) -> list[Change]:
    split = explicit_split(c.parallel.stage_split) or ()
    ranks = len(split) // c.parallel.chunks
    pipeline: list[Change] = [(_PP, ranks)] if ranks > 1 else []
    return [*pipeline, (_LAYERS, sum(split)), (_KEY, EVEN)]


def _long_enough(split: tuple[int, ...], c: RunConfig) -> bool:
    return len(split) == num_stages(c)


RULES = (
    Rule(
        "split_known",
        (_KEY,),
        f"{_KEY} is even, auto, or the layers of each stage along the model, joined by commas",
        lambda c: c.parallel.stage_split in (EVEN, AUTO) or explicit_split(c.parallel.stage_split) is not None,
        lambda c: [(_KEY, EVEN)],
    ),
    Rule(
        "split_length",
        (_KEY, _PP, _CHUNKS),
        f"{_KEY} needs a number for each stage: {_PP} x {_CHUNKS} of them",
        _obeys(_long_enough),
        _changes,
    ),
    Rule(
        "split_sum",
        (_KEY, _LAYERS),
        f"the numbers of {_KEY} must add up to {_LAYERS}",
        _obeys(lambda split, c: sum(split) == c.model.num_layers),
        lambda c: _changes(c)[::-1],
    ),
    Rule(
        "split_empty",
        (_KEY,),
        f"only the first and the last number of {_KEY} may be 0: the embedding and the head live there",
        _obeys(lambda split, c: all(split[1:-1])),
        lambda c: [(_KEY, EVEN)],
    ),
)
