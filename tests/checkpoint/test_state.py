"""Saving and loading a run through the engine: any layout loads any, other models are refused, a crash costs nothing."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalm.checkpoint.reshard import read_whole
from megalm.checkpoint.sharded import LATEST, find_checkpoint, read_manifest
from megalm.checkpoint.state import BUFFER, RunState, check_same_model, load_checkpoint, save_checkpoint, state_of
from megalm.config.model import ModelConfig
from megalm.config.parallel import ParallelConfig, parse_layout
from megalm.config.run import RunConfig
from megalm.errors import CheckpointError
from megalm.models.plans import TIED
from megalm.models.registry import build_model
from megalm.parallel.engine import MOMENTS, WEIGHT, Engine
from megalm.parallel.tensor_parallel import local_slice
from megalm.parallel.topology import build_topology
from megalm.testing import run_distributed
from megalm.train.build import DTYPES, build_engine, build_stage

STATE = RunState(step=3, consumed_samples=48, consumed_tokens=480, best_valid_loss=1.5, evaluations_without_gain=1)
KINDS = (WEIGHT, *MOMENTS)


def config_of(layout: str, architecture: str = "llama", tied: bool = False, precision: str = "fp32") -> RunConfig:
    values, _ = parse_layout(layout)
    config = RunConfig(
        model=ModelConfig(architecture, 40, 16, 3, 4, 2 if architecture == "llama" else 0, max_seq_length=8, tie_embeddings=tied),
        parallel=ParallelConfig(**values),  # type: ignore[arg-type]
    )
    config.train.precision = precision
    return config


def build(config: RunConfig) -> Engine:
    """The engine of this rank, with fresh weights."""
    topology, stages = build_topology(config.parallel, torch.device("cpu")), config.parallel.pipeline_parallel
    stage = build_stage(config, topology, topology.pipeline.rank, stages, DTYPES[config.train.precision])
    engine = build_engine(config, topology, torch.nn.ModuleList([stage]))
    engine.buffers = dict(stage.named_buffers())
    return engine


def value_of(kind: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What the whole tensor of this kind and name is filled with: positive, and no two alike."""
    seed = int.from_bytes(hashlib.sha256(f"{kind}/{name}".encode()).digest()[:4], "little")
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def whole_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build_model(config.model).named_parameters()}


def parts(engine: Engine, config: RunConfig) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(name, kind, expected slice) of everything that this rank holds."""
    shapes, tied = whole_shapes(config), TIED if config.model.tie_embeddings else {}
    for name, parameter in engine.parameters.items():
        source = tied.get(name, name)
        for kind in KINDS:
            yield name, kind, local_slice(parameter, engine.shapes[name], value_of(kind, source, shapes[source]))


def fill(engine: Engine, config: RunConfig) -> None:
    engine.prepare_load(STATE.step)
    for name, kind, value in parts(engine, config):
        engine.write(name, kind, value)
    for name, buffer in engine.buffers.items():
        buffer.copy_(value_of(BUFFER, name, tuple(buffer.shape)))
    engine.finish_load()


def write_on(rank: int, world_size: int, root: str, config: RunConfig) -> None:
    engine = build(config)
    fill(engine, config)
    save_checkpoint(Path(root), engine, STATE, asdict(config), keep=0)


def differing_on(rank: int, world_size: int, root: str, config: RunConfig) -> list[str]:
    """What a rank that loads the checkpoint does not hold as it should; nothing, if all is well."""
    engine = build(config)
    state = load_checkpoint(find_checkpoint(Path(root)), engine, asdict(config)["model"])
    wrong = [] if state == STATE and engine.steps_done == STATE.step else [f"state {state}"]
    for name, kind, value in parts(engine, config):
        found = engine.read(name, kind)
        if not torch.equal(found, value):
            wrong.append(f"{kind}/{name}")
        weights = engine.parameters[name].data
        if kind == WEIGHT and weights.shape == value.shape and not torch.equal(weights, value.to(weights.dtype)):
            wrong.append(f"the forward's {name}")
    for name, buffer in engine.buffers.items():
        if not torch.equal(buffer, value_of(BUFFER, name, tuple(buffer.shape))):
            wrong.append(name)
    return wrong


PAIRS = [("tp2", "pp2"), ("pp2", "tp2_sp"), ("dp2", "tp2"), ("tp2_pp2", "dp2"), ("dp2", "tp2_pp2")]
ZERO_PAIRS = [("dp2_zero1", "dp2_zero3"), ("dp2_zero3", "tp2"), ("tp2", "dp2_zero2"), ("dp2_zero2", "dp2_zero1")]


def world_size(layout: str) -> int:
    values, copies = parse_layout(layout)
    return copies * int(values.get("tensor_parallel", 1)) * int(values.get("pipeline_parallel", 1))  # type: ignore[call-overload]


def check_pair(writer: RunConfig, reader: RunConfig, ranks: tuple[int, int], root: Path) -> None:
    run_distributed(write_on, ranks[0], str(root), writer)
    folder = find_checkpoint(root)
    manifest = read_manifest(folder)
    shapes = whole_shapes(writer)
    biases = {f"{BUFFER}/{name.replace('weight', 'balance')}" for name in shapes if name.endswith("router.weight")}
    assert set(manifest.tensors) == {f"{kind}/{name}" for kind in KINDS for name in shapes} | biases
    for name, shape in shapes.items():  # also on no process at all
        for kind in KINDS:
            assert torch.equal(read_whole(folder, manifest, f"{kind}/{name}"), value_of(kind, name, shape))
    assert run_distributed(differing_on, ranks[1], str(root), reader) == [[]] * ranks[1]


@pytest.mark.dist
@pytest.mark.parametrize(("architecture", "tied", "pair"), [("llama", False, PAIRS[0]), ("gpt", True, PAIRS[4])])
def test_any_layout_loads_any(architecture: str, tied: bool, pair: tuple[str, str], tmp_path: Path) -> None:
    writer, reader = (config_of(layout, architecture, tied) for layout in pair)
    check_pair(writer, reader, (world_size(pair[0]), world_size(pair[1])), tmp_path)


@pytest.mark.dist
def test_experts_and_their_biases_on_other_ranks(tmp_path: Path) -> None:
    writer, reader = (config_of(layout) for layout in ("dp2_ep2", "pp2"))
    for config in (writer, reader):
        config.model = replace(config.model, num_experts=4, expert_ffn_size=12)
    check_pair(writer, reader, (2, 2), tmp_path)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("llama", True), ("gpt", True)])
def test_all_pairs(architecture: str, tied: bool, pair: tuple[str, str], tmp_path: Path) -> None:
    writer, reader = (config_of(layout, architecture, tied) for layout in pair)
    check_pair(writer, reader, (world_size(pair[0]), world_size(pair[1])), tmp_path)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pair", ZERO_PAIRS)
def test_zero_stages(pair: tuple[str, str], precision: str, tmp_path: Path) -> None:
    """DeepSpeed's flat, padded and partitioned buffers give back what was written, master weights to the last bit."""
    writer, reader = (config_of(layout, "llama", False, precision) for layout in pair)
    check_pair(writer, reader, (world_size(pair[0]), world_size(pair[1])), tmp_path)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_round_trip_in_one_process(precision: str, alone: None, tmp_path: Path) -> None:
    config = config_of("single", precision=precision)
    write_on(0, 1, str(tmp_path), config)
    assert differing_on(0, 1, str(tmp_path), config) == []


def test_fp16_goes_on_with_its_scale_and_without_the_skipped_steps(alone: None, tmp_path: Path) -> None:
    config = config_of("single", precision="fp16")
    engine, state = build(config), RunState(step=5)
    for overflow in (True, False, True, False, False):
        engine.loss_scale.update(overflow)
        state.note_scaling(engine.loss_scale, overflow)
    engine.prepare_load(3)
    folder = save_checkpoint(tmp_path, engine, state, asdict(config), 0)
    other = build(config)
    found = load_checkpoint(folder, other, asdict(config)["model"])
    assert (found.step, found.skipped_steps, other.steps_done) == (5, 2, 3)
    assert other.loss_scale == engine.loss_scale
    assert (engine.loss_scale.scale, engine.loss_scale.clean_steps) == (2.0**14, 2)


def test_before_the_first_step_there_are_weights_only(alone: None, tmp_path: Path) -> None:
    config = config_of("single")
    engine = build(config)
    folder = save_checkpoint(tmp_path, engine, RunState(), asdict(config), 0)
    assert {key.split("/")[0] for key in read_manifest(folder).tensors} == {WEIGHT}
    config.train.seed = 99
    other = build(config)
    assert load_checkpoint(folder, other, asdict(config)["model"]).step == 0
    for name in engine.parameters:
        assert torch.equal(other.read(name, WEIGHT), engine.read(name, WEIGHT))


def test_another_model_names_every_key(alone: None, tmp_path: Path) -> None:
    config = config_of("single")
    folder = save_checkpoint(tmp_path, build(config), RunState(), asdict(config), 0)
    model = replace(config.model, num_layers=4, hidden_size=32, ffn_size=128, vocab_size=50, rope_theta=5.0)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, build(config), asdict(model))
    found = {p.key: (p.value, p.fix) for p in caught.value.problems}
    assert found == {
        "model.vocab_size": (50, "model.vocab_size=40"),
        "model.hidden_size": (32, "model.hidden_size=16"),
        "model.num_layers": (4, "model.num_layers=3"),
        "model.ffn_size": (128, "model.ffn_size=64"),
        "model.rope_theta": (5.0, "model.rope_theta=10000.0"),
    }


def test_what_is_not_the_models_shape_may_change(alone: None, tmp_path: Path) -> None:
    config = config_of("single")
    folder = save_checkpoint(tmp_path, build(config), RunState(), asdict(config), 0)
    check_same_model(folder, read_manifest(folder), {**asdict(config)["model"], "dropout": 0.5, "init_std": 1.0})


OF_TRAINING = ("dropout", "init_std", "router_aux_loss", "router_z_loss", "router_balance_rate", "capacity_factor")


def test_every_key_that_gives_weights_another_shape_or_meaning_is_compared(alone: None, tmp_path: Path) -> None:
    config = config_of("single")
    folder = save_checkpoint(tmp_path, build(config), RunState(), asdict(config), 0)
    for key, value in asdict(config.model).items():
        if key not in OF_TRAINING:
            with pytest.raises(CheckpointError, match=f"model.{key} = "):
                check_same_model(folder, read_manifest(folder), {**asdict(config.model), key: f"not {value}"})


def test_fields_of_a_later_version_are_left_out(alone: None, tmp_path: Path) -> None:
    config = config_of("single")
    manifest = read_manifest(save_checkpoint(tmp_path, build(config), replace(STATE, step=0), asdict(config), 0))
    manifest.state["of_tomorrow"] = 1
    assert state_of(manifest) == replace(STATE, step=0)


class Crash(BaseException):
    """Nobody catches it."""


_countdown: list[int] = []  # operations on the file system that may still happen; empty: any number
_FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def _crash_in_time(event: str, _: Any) -> None:
    if _countdown and event in _FILE_EVENTS:
        _countdown[0] -= 1
        if _countdown[0] < 0:
            raise Crash(event)


@pytest.fixture(scope="module", autouse=True)
def _audit() -> None:
    sys.addaudithook(_crash_in_time)  # it cannot be taken away; without a countdown it does nothing


def crash_after(operations: int, root: Path, engine: Engine, config: RunConfig, step: int, keep: int) -> bool:
    """Save, and stop before the given operation on the file system. Whether the save came to its end."""
    _countdown[:] = [operations]
    try:
        save_checkpoint(root, engine, RunState(step=step), asdict(config), keep)
        return True
    except Crash:
        return False
    finally:
        _countdown.clear()


def assert_whole(folder: Path) -> None:
    manifest = read_manifest(folder)
    for key in manifest.tensors:
        read_whole(folder, manifest, key)


@pytest.mark.parametrize(("existing", "keep"), [([], 0), ([1], 1), ([1, 2], 1), ([1, 2, 5], 2)])
def test_a_crash_at_any_point_leaves_a_whole_latest(existing: list[int], keep: int, alone: None, tmp_path: Path) -> None:
    """Before every single operation on the file system: `latest` names a checkpoint that loads, and saving again works.

    In the last case a step 5 exists already, of a run that went back to step 2 and comes by again.
    """
    config = config_of("single")
    engine, finished, operations = build(config), False, 0
    while not finished:
        root = tmp_path / str(operations)
        for step in existing:
            save_checkpoint(root, engine, RunState(step=step), asdict(config), 0)
        if 5 in existing:
            (root / LATEST).write_text("step-00000002\n")
        last = max((step for step in existing if step < 5), default=0)
        finished = crash_after(operations, root, engine, config, 5, keep)
        if (root / LATEST).is_file():
            found = find_checkpoint(root)
            assert found.name in (f"step-{last:08d}", "step-00000005")
            assert_whole(found)
        else:
            assert not existing and not finished
        for folder in root.glob("step-*"):
            assert_whole(folder)
        save_checkpoint(root, engine, RunState(step=6), asdict(config), 1)
        assert sorted(p.name for p in root.iterdir()) == [LATEST, "step-00000006"], "nothing is left behind"
        operations += 1
    assert operations > 8, "the crashes really happened"
