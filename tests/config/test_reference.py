"""The generated reference is current and complete."""

from __future__ import annotations

from pathlib import Path

from megalm.config.fields import flatten, leaves
from megalm.config.reference import markdown, option_lines
from megalm.config.run import ROOTS
from megalm.config.validate import RULES

PAGE = Path(__file__).parents[2] / "docs/configuration.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == markdown() + "\n", "python -m megalm.config.reference > docs/configuration.md"


def test_the_page_names_every_key_and_rule() -> None:
    text = markdown()
    for root in ROOTS.values():
        assert all(f"`{key}`" in text for key, _, _ in leaves(root))
    assert all(f"`{rule.name}`" in text for rule in RULES)


def test_option_lines_show_default_help_and_choices() -> None:
    values = flatten(ROOTS["pretrain"]()) | {"train.steps": 7}
    lines = "\n".join(option_lines(ROOTS["pretrain"], values))
    assert "train.steps=7" in lines
    assert "optim.schedule=cosine" in lines
    assert "[cosine, linear, constant, inverse_sqrt, wsd]" in lines
    assert "peak learning rate" in lines
