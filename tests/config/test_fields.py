"""What is proposed can be pasted: every value survives the shell and Hydra's grammar."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from megalm.config.fields import assign, default_of, describe, leaves, nearest
from megalm.config.run import RunConfig


def pasted(key: str, value: object) -> object:
    (text,) = shlex.split(assign(key, value))
    return OverridesParser.create().parse_override(text).value()


@pytest.mark.parametrize(
    "value",
    [
        "",
        "1",
        "1e-4",
        "true",
        "null",
        "nan",
        "-inf",
        "a b",
        "0.9,0.1,0",
        'say "x"',
        "it's",
        "[a]",
        "a=b",
        "runs/x",
        "{a: 1}",
    ],
)
def test_text_stays_text(value: str) -> None:
    assert pasted("data.path", value) == value


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="$"), max_size=12))
def test_any_text_stays_itself(value: str) -> None:
    assert pasted("data.path", value) == value


@given(
    st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.lists(st.from_regex(r"[a-z][a-z0-9_]*", fullmatch=True))
)
def test_other_values_stay_themselves(value: object) -> None:
    assert pasted("x.y", value) == value


def test_every_field_has_help_and_a_legal_default() -> None:
    for key, field, kind in leaves(RunConfig):
        assert field.metadata["help"], key
        assert describe(field, kind), key
        assert nearest(field, kind, default_of(field)) == default_of(field), key
