"""Everything that can be wrong with a command line is found before Hydra runs."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from hydra.types import RunMode

from megalm.config.reader import read
from megalm.config.run import ROOTS
from megalm.errors import Problem
from megalm.launchers import compose
from megalm.launchers.compose import inspect, parse
from megalm.launchers.options import defaults


def look(*arguments: str, verb: str = "pretrain") -> tuple[Any, list[Problem]]:
    return inspect(parse(verb, list(arguments)))


def config_of(*arguments: str, verb: str = "pretrain") -> Any:
    config, problems = look(*arguments, verb=verb)
    assert problems == []
    return config


@pytest.mark.parametrize(
    ("argument", "key", "rule"),
    [
        ("model.hiden_size=3", "model.hiden_size", "did you mean model.hidden_size?"),
        ("+model.foo=3", "model.foo", "unknown key"),
        ("~model.foo", "model.foo", "unknown key"),
        ("lr=3", "lr", "did you mean optim.lr?"),
        ("modle=tiny", "modle", "did you mean model?"),
        ("model=tinny", "model", "did you mean model=tiny?"),
        ("model=5", "model", "no such option"),
        ("parallel=tp2_foo", "parallel", "no such option"),
        ("train.steps=many", "train.steps", "wrong type"),
        ("train.steps=1,2", "train.steps", "several values"),
        ("train.seed={", "train.seed", "cannot read this value"),
        ("train.run_dir=", "train.run_dir", "out of bounds"),
        ("train.run_dir=${", "pretrain", "cannot compose"),
        ("--hepl", "--hepl", "did you mean --help?"),
        ("cluster.threads=9999", "cluster.threads", "out of bounds"),
        ("steps", "steps", "did you mean train.steps=...?"),
        ("absent.yaml", "absent.yaml", "cannot read this file"),
        ("train.run_dir=${nowhere}", "train.run_dir", "cannot resolve"),
        ("train.run_dir=${oc.env:HOME}", "train.run_dir", "resolvers"),
        ("model._target_=os.system", "model._target_", "unknown key"),
        ("train.seed=null", "train.seed", "wrong type"),
        ("--config-dir=absent", "--config-dir", "no such folder"),
        ("--experimental-rerun=x", "--experimental-rerun", "unpickles"),
        ("parallel.zero=9", "parallel.zero", "not one of the allowed values"),
        ("hydra.nothing=1", "pretrain", "cannot compose"),
    ],
)
def test_one_fault(argument: str, key: str, rule: str) -> None:
    _, problems = look(argument)
    assert [problem.key for problem in problems] == [key]
    assert rule in problems[0].rule


def test_all_faults_at_once() -> None:
    _, problems = look("model=tinny", "lr=3", "train.steps=0", "train.patience=1", "foo")
    assert {problem.key for problem in problems} == {"model", "lr", "train.steps", "train.patience", "foo"}


def test_a_sweep_is_fine_with_m() -> None:
    config, problems = look("-m", "optim.lr=1e-3,3e-4", "model=tiny,tiny_gpt")
    assert problems == []
    assert config.optim.lr == 1e-3


def test_every_job_of_a_sweep_is_looked_at() -> None:
    _, problems = look("-m", "train.global_batch_size=16,15", "model=tiny,tinny", "train.seed=1,2")
    assert [problem.key for problem in problems] == ["model", "train.global_batch_size"]


def test_layouts_need_no_yaml() -> None:
    config = config_of("parallel=tp2_pp2_dp2_zero3")
    assert (config.parallel.tensor_parallel, config.parallel.pipeline_parallel, config.parallel.zero) == (2, 2, 3)
    assert config.cluster.num_processes == 8
    assert config_of("parallel=tp4_dp1", "parallel.zero=1").parallel.zero == 1


def test_the_verbs_own_section_may_be_left_out() -> None:
    assert config_of("layouts=[tp2_pp2,dp2_zero3]", "steps=7", verb="parity").parity.steps == 7
    assert config_of('prompt="1,2"', verb="generate").generate.prompt == "1,2"
    assert config_of("source=x", verb="prepare").prepare.source == "x"
    assert config_of("steps=7", "trace=t.json", "train.seed=3").train.steps == 7
    assert config_of("show", "num_microbatches=7", verb="pipeline").pipeline.num_microbatches == 7


def test_order_of_defaults_group_file_key(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {num_layers: 7, hidden_size: 64}\noptim: {lr: 1e-4}\n")
    config = config_of(str(file), "model=llama_125m", "model.hidden_size=96")
    assert (config.model.vocab_size, config.model.num_layers, config.model.hidden_size) == (32000, 7, 96)
    assert config.optim.lr == 1e-4  # yaml reads 1e-4 as text
    assert config.train.steps == 1000


def test_file_with_its_own_defaults_list(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("num_layers: 3\n")
    file = tmp_path / "pretrain.yaml"
    file.write_text("defaults: [pretrain, {override /model: mine}, {override /parallel: pp3_dp2}, _self_]\ntrain: {steps: 5}\n")
    config = config_of(str(file), "train.global_batch_size=24")
    assert (config.model.num_layers, config.train.steps, config.data_parallel) == (3, 5, 2)


@pytest.mark.parametrize("text", ["a: [", "a: 1\na: 2", "- 1\n- 2", "42"])
def test_bad_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    _, problems = look(str(tmp_path / "bad.yaml"))
    assert [problem.rule.split(":")[0].split(" of ")[0] for problem in problems] == ["not a yaml mapping"]


def test_file_that_names_an_unknown_group_option(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("defaults: [pretrain, {override /model: tinny}, _self_]\n")
    _, problems = look(str(tmp_path / "bad.yaml"))
    assert "cannot compose" in problems[0].rule
    assert "tinny" in problems[0].rule


def test_interpolation_between_keys() -> None:
    assert config_of("train.run_dir=runs/${optim.lr}").train.run_dir == "runs/0.0003"


def test_the_saved_config_of_a_run_is_a_config(tmp_path: Path) -> None:
    import dataclasses

    import yaml

    config = config_of("model=llama_125m", "parallel=tp2_dp2")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    assert config_of(str(file)) == config


@pytest.mark.parametrize(
    "text", ["the cat, dog", "true", "def f(x):", "a\nb", "{", "5", r"\d \" \\", "\u00e9 \u65e5", "it's", '"a" and "b"']
)
def test_text_is_what_was_typed(text: str) -> None:
    assert config_of(f"prompt={text}", verb="generate").generate.prompt == text
    assert config_of(f"generate.prompt={text}", verb="generate").generate.prompt == text


def test_quoted_text_and_escaped_dollar() -> None:
    assert config_of("data.split='0.9,0.1,0'").data.split == "0.9,0.1,0"
    assert config_of(r"prompt=a \${b}", verb="generate").generate.prompt == "a ${b}"
    _, problems = look("prompt=a ${b}", verb="generate")
    assert "for the text itself" in problems[0].fix


def test_jobs_of_a_sweep_need_two_folders() -> None:
    _, (problem,) = look("-m", "train.run_dir=runs/x", "optim.lr=1,2")
    assert (problem.key, problem.fix) == ("train.run_dir", "'train.run_dir=\"runs/x_${optim.lr}\"'")
    config_of("optim.lr=1,2", "-m", "train.run_dir=runs/x_${optim.lr}")
    _, (problem,) = look("-m", "train.run_dir=runs/x", "model=tiny,tiny_gpt")
    assert problem.fix == "leave train.run_dir out"


def test_a_stray_sweep_names_the_full_key() -> None:
    _, (problem,) = look("steps=1,2", verb="parity")
    assert (problem.key, problem.fix) == ("parity.steps", "parity.steps=1")


@pytest.mark.parametrize(("argument", "fix"), [("modle=tiny", "model=tiny"), ("pararell=tp2", "parallel=tp2")])
def test_a_mistyped_group(argument: str, fix: str) -> None:
    assert [problem.fix for problem in look(argument)[1]] == [fix]


def test_a_group_inside_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: tiny\n")
    _, (problem,) = look(str(tmp_path / "mine.yaml"))
    assert (problem.key, problem.fix) == ("model", "model=tiny")


@pytest.mark.parametrize("verb", ROOTS)
def test_help_shows_what_hydra_would_compose(verb: str) -> None:
    command = parse(verb, [])
    composed = compose._loader(command.options).load_configuration(verb, list(compose.HYDRA_SETTINGS), RunMode.RUN)
    config, problems = read(ROOTS[verb], compose.plain(composed)[0])
    assert problems == []
    nested: dict = {}
    for key, value in defaults(verb).items():
        *sections, name = key.split(".")
        reduce(lambda node, section: node.setdefault(section, {}), sections, nested)[name] = value
    assert read(ROOTS[verb], nested) == (config, [])


def test_parity_has_layouts_of_its_own() -> None:
    _, problems = look("parallel=tp2", "steps=0", verb="parity")
    assert [problem.key for problem in problems] == ["parallel", "parity.steps"]
    assert problems[0].fix == "'parity.layouts=[tp2]'"


# --- a user's own schedule against the rest of the run -----------------------------------------------------------------

_SWAPPED = "1F0,1B0,1F1,1B1\n0F0,0B0,0F1,0B1\n"  # the model's first stage on the second rank
_HALVES = "0F0,0F1,0B0,0B1\n1F0,1I0,1W0,1F1,1B1\n"


@pytest.mark.parametrize(
    ("rows", "arguments", "fix"),
    [
        (_SWAPPED, ["model=tiny_gpt", "model.tie_embeddings=true"], "model.tie_embeddings=false"),
        (_HALVES, ["parallel.zero=2", "parallel.zero_reduce=microbatch"], "parallel.zero_reduce=step"),
    ],
    ids=["tied embeddings apart", "halves with hooks"],
)
def test_a_schedule_of_ones_own_must_suit_the_run(rows: str, arguments: list[str], fix: str, tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(rows)
    common = ["parallel.pipeline_parallel=2", "parallel.schedule=csv", f"parallel.schedule_file={path}"]
    sizes = ["train.global_batch_size=2", "train.micro_batch_size=1", "cluster.device=cpu"]
    _, problems = inspect(parse("pretrain", [*common, *sizes, *arguments]))
    assert [(problem.key, problem.fix) for problem in problems] == [("parallel.schedule_file", fix)]
    _, problems = inspect(parse("pretrain", [*common, *sizes, *arguments, fix]))
    assert problems == []


def test_several_values_of_an_unknown_key_name_the_key() -> None:
    _, problems = inspect(parse("pretrain", ["parallel=pp2", "stage_split=3,1"]))
    assert [problem.key for problem in problems] == ["stage_split"]
    assert "did you mean parallel.stage_split?" in problems[0].rule and "3,1" in problems[0].fix
