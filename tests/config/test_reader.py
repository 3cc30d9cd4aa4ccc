"""The reader finds every kind of fault, all in one pass, and proposes the nearest legal value."""

from __future__ import annotations

import dataclasses

import pytest

from megalm.config.reader import defaults_of, forbidden, read, suggest
from megalm.config.run import ROOTS, ParityRun, RunConfig
from megalm.config.tasks import GenerateRun, KernelsRun


def fault(raw: dict, root: type = RunConfig) -> tuple[str, str, str]:
    """(key, rule, fix) of the only problem."""
    _, problems = read(root, raw)
    assert len(problems) == 1, problems
    return problems[0].key, problems[0].rule, problems[0].fix


@pytest.mark.parametrize("root", ROOTS.values())
def test_defaults_are_sound(root: type) -> None:
    config, problems = read(root, defaults_of(root))
    assert problems == []
    assert config == root()


def test_defaults_keep_what_is_derived_later() -> None:
    assert defaults_of(RunConfig)["model"]["head_dim"] == 0
    assert RunConfig().model.head_dim == 32


@pytest.mark.parametrize(
    ("raw", "value"),
    [({"optim": {"lr": 1}}, 1.0), ({"optim": {"lr": "1e-4"}}, 1e-4), ({"optim": {"lr": 0.5}}, 0.5)],
)
def test_numbers_that_are_fine_as_floats(raw: dict, value: float) -> None:
    config, problems = read(RunConfig, raw)
    assert problems == []
    assert config.optim.lr == value
    assert isinstance(config.optim.lr, float)


def test_list_of_texts() -> None:
    config, problems = read(ParityRun, {"parity": {"layouts": ["tp2", "pp2"]}})
    assert problems == []
    assert config.parity.layouts == ["tp2", "pp2"]


def test_list_of_numbers() -> None:
    config, problems = read(KernelsRun, {"compile": {"arch": [90, 80], "ops": ["rotary"]}})
    assert problems == []
    assert (config.compile.arch, config.compile.ops) == ([90, 80], ["rotary"])


@pytest.mark.parametrize(
    ("key", "value", "rule", "fix"),
    [
        ("arch", [90, "x"], "wrong type", "'compile.arch=[80,90,100]'"),
        ("arch", [90.0], "wrong type", "'compile.arch=[80,90,100]'"),
        ("arch", 90, "wrong type", "'compile.arch=[90]'"),
        ("arch", [90, 70], "not one of the allowed values", "'compile.arch=[90]'"),
        ("arch", [], "not one of the allowed values", "'compile.arch=[80,90,100]'"),
        ("ops", ["swiglu", "rms_nrom"], "not one of the allowed values", "'compile.ops=[rms_norm,swiglu]'"),
        ("ops", "rotary", "wrong type", "'compile.ops=[rotary]'"),
    ],
)
def test_lists_of_what_is_allowed(key: str, value: object, rule: str, fix: str) -> None:
    assert fault({"compile": {key: value}}, KernelsRun) == (f"compile.{key}", rule, fix)


@pytest.mark.parametrize(
    ("section", "key", "value", "fix"),
    [
        ("train", "steps", 1000.0, "train.steps=1000"),
        ("train", "steps", "many", "train.steps=1000"),
        ("train", "steps", True, "train.steps=1000"),
        ("train", "steps", None, "train.steps=1000"),
        ("train", "run_dir", 5, "'train.run_dir=\"5\"'"),
        ("train", "run_dir", "???", "train.run_dir=runs/pretrain"),
        ("optim", "lr", True, "optim.lr=0.0003"),
        ("optim", "lr", float("nan"), "optim.lr=0.0003"),
        ("optim", "lr", float("inf"), "optim.lr=0.0003"),
        ("tracking", "tensorboard", "yes", "tracking.tensorboard=true"),
        ("tracking", "tensorboard", 1, "tracking.tensorboard=true"),
        ("tracking", "wandb", False, "tracking.wandb=off"),
        ("data", "split", [0.9, 0.1, 0], "'data.split=\"0.9,0.1,0\"'"),
        ("model", "num_heads", {"a": 1}, "model.num_heads=4"),
    ],
)
def test_wrong_type(section: str, key: str, value: object, fix: str) -> None:
    assert fault({section: {key: value}}) == (f"{section}.{key}", "wrong type", fix)


def test_lone_text_for_a_list() -> None:
    assert fault({"parity": {"layouts": "tp2"}}, ParityRun)[2] == "'parity.layouts=[tp2]'"


@pytest.mark.parametrize(
    ("section", "key", "value", "fix"),
    [
        ("train", "steps", 0, "train.steps=1"),
        ("model", "dropout", 1.5, "model.dropout=0.99"),
        ("model", "dropout", -1, "model.dropout=0.0"),
        ("optim", "lr", 0, "optim.lr=0.0003"),
        ("parallel", "zero", 7, "parallel.zero=3"),
        ("optim", "schedule", "cosin", "optim.schedule=cosine"),
        ("optim", "schedule", "zzz", "optim.schedule=cosine"),
    ],
)
def test_out_of_bounds(section: str, key: str, value: object, fix: str) -> None:
    found = fault({section: {key: value}})
    assert found[0] == f"{section}.{key}"
    assert found[1] in ("out of bounds", "not one of the allowed values")
    assert found[2] == fix


@pytest.mark.parametrize(
    ("raw", "key", "guess"),
    [
        ({"model": {"hiden_size": 3}}, "model.hiden_size", "model.hidden_size=3"),
        ({"model": {"seq_length": 3}}, "model.seq_length", "data.seq_length=3"),
        ({"lr": 3}, "lr", "optim.lr=3"),
        ({"zzzzz": 3}, "zzzzz", "remove zzzzz"),
        ({"modle": {"hidden_size": 3}}, "modle", "rename it to model"),
    ],
)
def test_unknown_key(raw: dict, key: str, guess: str) -> None:
    found = fault(raw)
    assert (found[0], found[2]) == (key, guess)
    assert found[1].startswith("unknown")


def test_section_that_is_no_section() -> None:
    assert fault({"model": 5}) == ("model", "wrong type", "remove model")
    assert fault({"model": None})[0] == "model"


@pytest.mark.parametrize("key", ["_target_", "_args_", "_partial_"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_keys_that_build_objects_are_refused(key: str, depth: int) -> None:
    raw: dict = {key: "os.system"}
    for name in ("hidden_size", "model")[2 - depth :]:
        raw = {name: raw}
    _, problems = read(RunConfig, raw)
    assert any("never builds objects" in problem.rule and problem.key.endswith(key) for problem in problems)


def test_resolvers_are_refused_wherever_they_hide() -> None:
    assert "resolvers" in fault({"train": {"run_dir": "/tmp/${oc.env:HOME}"}})[1]
    assert "resolvers" in fault({"parity": {"layouts": ["${ oc.env : HOME}"]}}, ParityRun)[1]
    assert list(forbidden({"train": {"run_dir": "runs/${optim.lr}"}})) == []


def test_all_faults_at_once_and_the_nearest_value_stands_in() -> None:
    config, problems = read(RunConfig, {"train": {"steps": 0, "foo": 1, "seed": "x"}, "modle": {}, "optim": {"lr": -1}})
    assert {problem.key for problem in problems} == {"train.steps", "train.foo", "train.seed", "modle", "optim.lr"}
    assert dataclasses.asdict(config) == dataclasses.asdict(read(RunConfig, {"train": {"steps": 1}})[0])


def test_suggest_nothing_when_nothing_is_near() -> None:
    assert suggest("qqqq", ["model.hidden_size"]) == ""


def test_other_roots_read_their_own_sections() -> None:
    config, problems = read(GenerateRun, {"generate": {"top_p": 0.5}})
    assert problems == []
    assert config.generate.top_p == 0.5
