"""Rules about cross-validation."""

from __future__ import annotations

from megalm.config.fixes import Rule

RULES = (
    Rule(
        "fold_counted",
        ("data.fold", "data.num_folds"),
        "folds are counted from 0, so data.fold is less than data.num_folds",
        lambda c: c.data.fold < c.data.num_folds,
        lambda c: [("data.fold", c.data.num_folds - 1), ("data.num_folds", c.data.fold + 1)],
    ),
    Rule(
        "fold_evaluated",
        ("data.fold", "train.eval_every"),
        "a fold is there to be evaluated",
        lambda c: c.data.fold < 0 or c.train.eval_every > 0,
        lambda c: [("train.eval_every", max(1, c.train.steps // 10)), ("data.fold", -1)],
    ),
)
