"""The exception family, and the guard around writing files."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.errors import ConfigError, Problem, RunError, writing


def test_a_message_shows_key_value_rule_allowed_and_fix() -> None:
    error = ConfigError(Problem("a.b", 3, "must be even", "2, 4", "a.b=2"), Problem("c", None, "is unknown"))
    assert str(error).splitlines() == [
        "config error: 2 problems",
        "1. a.b = 3",
        "  rule:    must be even",
        "  allowed: 2, 4",
        "  fix:     a.b=2",
        "2. c",
        "  rule:    is unknown",
    ]
    assert error.exit_code == 2


def test_writing_names_the_file_and_the_fix(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write .*no/file: No such file") as caught, writing(tmp_path):
        (tmp_path / "no" / "file").write_text("x")
    assert caught.value.exit_code == 1 and "train.run_dir=" in caught.value.problems[0].fix
