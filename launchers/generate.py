"""Generate: continue a prompt with a trained model, on one process."""

from __future__ import annotations

from megalm.config.tasks import GenerateRun
from megalm.launchers.app import run_verb


def task(config: GenerateRun) -> None:
    """Prints the continuations."""
    from megalm.inference.generate import generate_command

    generate_command(config.generate)


def main() -> None:
    """`megalm generate ...`."""
    run_verb("generate", task)


if __name__ == "__main__":
    main()
