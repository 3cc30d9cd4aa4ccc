"""Every yaml file that is shipped composes and says only what its name promises."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalm.config.layouts import layout_node
from megalm.config.run import ROOTS
from megalm.launchers.cli import VERBS
from megalm.launchers.compose import inspect, parse
from megalm.models.shapes import stage_shapes

CONF = Path(__file__).parents[2] / "conf"
FILES = [path.relative_to(CONF).with_suffix("") for path in sorted(CONF.glob("*/*.yaml"))]


def compose(verb: str, *arguments: str) -> Any:
    config, problems = inspect(parse(verb, list(arguments)))
    assert problems == []
    return config


def test_a_root_for_each_verb() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(ROOTS) == set(VERBS) - {"check", "slurm"}  # which take another verb


@pytest.mark.parametrize("verb", ROOTS)
def test_roots_compose(verb: str) -> None:
    compose(verb)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_options_compose(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ["model=llama_7b"] if file.parent.name == "parallel" else []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0" if file.parent.name == "kernels" else "")
    compose("pretrain", *model, f"{file.parent}={file.name}")


@pytest.mark.parametrize("path", sorted((CONF / "parallel").glob("*.yaml")), ids=lambda path: path.stem)
def test_layout_files_say_what_their_names_say(path: Path) -> None:
    stated = yaml.safe_load(path.read_text())
    default = {"tensor_parallel": 1}
    assert {"parallel": {**default, **stated}} == {"parallel": {**default, **layout_node(path.stem)["parallel"]}}


def test_tiny_is_the_dataclass() -> None:
    assert compose("pretrain") == compose("pretrain", "model=tiny", "parallel=single")


@pytest.mark.parametrize(
    ("name", "billions", "used"),
    [("mixtral_8x7b", 46.7, 12.9), ("deepseek_v2_lite", 15.7, 2.4), ("deepseek_v3", 671.0, 37.0)],
)
def test_published_sizes_with_experts(name: str, billions: float, used: float) -> None:
    """All weights, and those that a token is multiplied with, as the papers round them."""
    m = compose("pretrain", f"model={name}").model
    shapes = stage_shapes(m, range(m.num_layers))
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    active = sum(sizes.values()) - experts * (1 - m.experts_per_token / m.num_experts)
    assert sum(sizes.values()) / 1e9 == pytest.approx(billions, rel=0.002)
    assert (active - sizes["embedding.weight"]) / 1e9 == pytest.approx(used, rel=0.03)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt2_small", 0.124),
        ("gpt2_medium", 0.355),
        ("gpt2_large", 0.774),
        ("gpt2_xl", 1.558),
        ("gpt3_175b", 174.6),
        ("llama_125m", 0.134),
        ("llama_1b", 1.236),
        ("llama_3b", 3.213),
        ("llama_7b", 6.738),
        ("llama_8b", 8.030),
        ("llama_13b", 13.016),
        ("llama_70b", 70.554),
        ("llama_405b", 405.85),
    ],
)
def test_published_sizes(name: str, billions: float) -> None:
    m = compose("pretrain", f"model={name}").model
    attention = m.hidden_size * m.head_dim * (2 * m.num_heads + 2 * m.num_kv_heads)
    mlp = (3 if m.architecture == "llama" else 2) * m.hidden_size * m.ffn_size
    tables = m.vocab_size * m.hidden_size * (1 if m.tie_embeddings else 2)
    positions = m.max_seq_length * m.hidden_size if m.architecture == "gpt" else 0
    weights = m.num_layers * (attention + mlp) + tables + positions
    assert weights / 1e9 == pytest.approx(billions, rel=0.004)
