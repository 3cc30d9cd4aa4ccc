"""The command: fast help, no torch, a friendly word for every mistake."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from megalm import __version__
from megalm.config.fields import leaves
from megalm.config.run import RunConfig
from megalm.launchers.cli import VERBS

Megalm = Callable[..., subprocess.CompletedProcess]


def test_help_is_fast_and_names_the_verbs(megalm: Megalm) -> None:
    begin = time.monotonic()
    run = megalm("--help")
    assert time.monotonic() - begin < 1
    assert run.returncode == 0
    assert all(f"\n  {verb} " in run.stdout for verb in VERBS)
    assert megalm().stdout == run.stdout


def test_help_imports_neither_torch_nor_hydra() -> None:
    code = (
        "import sys; from megalm.launchers import cli, options; cli.usage(); options.help_text('pretrain'); "
        "assert not {'torch', 'hydra', 'omegaconf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_version(megalm: Megalm) -> None:
    assert megalm("--version").stdout.strip() == f"megalm {__version__}"


def test_unknown_verb(megalm: Megalm) -> None:
    run = megalm("pretrian")
    assert run.returncode == 2
    assert "Did you mean pretrain?" in run.stderr
    assert megalm("zzz").returncode == 2


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_a_verb_shows_every_option(flag: str, megalm: Megalm) -> None:
    text = megalm("pretrain", flag).stdout
    for key, field, _ in leaves(RunConfig):
        assert f"{key}=" in text
        assert field.metadata["help"] in text
    assert "tiny_gpt" in text


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "check"])
def test_every_verb_has_help_and_refuses_an_unknown_key(verb: str, megalm: Megalm) -> None:
    assert f"usage: megalm {verb}" in megalm(verb, "--help").stdout
    run = megalm(verb, "zzzzzz=1")
    assert (run.returncode, run.stderr.splitlines()[0]) == (2, "config error: 1 problem")


@pytest.mark.parametrize("command", [["pretrain"], ["check", "pretrain"]])
@pytest.mark.parametrize(
    ("argument", "hint"),
    [("model.hiden_size=3", "did you mean model.hidden_size?"), ("model=tinny", "did you mean model=tiny?")],
)
def test_mistakes_end_with_2_and_a_hint(command: list[str], argument: str, hint: str, megalm: Megalm) -> None:
    run = megalm(*command, argument)
    assert run.returncode == 2
    assert hint in run.stderr
    assert "Traceback" not in run.stderr
