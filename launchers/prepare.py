"""Prepare: turn text into indexed tokens and a tokenizer."""

from __future__ import annotations

from megalm.config.tasks import PrepareRun
from megalm.launchers.app import run_verb


def task(config: PrepareRun) -> None:
    """Writes the corpus and says what was done."""
    from megalm.data.tokenize import prepare

    print(prepare(config.prepare))


def main() -> None:
    """`megalm prepare ...`."""
    run_verb("prepare", task)


if __name__ == "__main__":
    main()
