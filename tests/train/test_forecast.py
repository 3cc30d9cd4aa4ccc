"""What is foretold of a run: layers per stage, memory per rank; and that building a stage takes no more than the stage."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megalm.config.load import load
from megalm.config.model import ModelConfig
from megalm.config.parallel import ParallelConfig
from megalm.config.run import RunConfig
from megalm.config.train import TrainConfig
from megalm.models.count import count_block_activations, count_head_activations, count_stage_parameters
from megalm.parallel.split import even_split
from megalm.train.forecast import layers_per_stage, predict_memory

# The shape of Llama 3 8B: its head multiplies as much as 2.4 blocks, its embedding is as large.
LARGE = ModelConfig("llama", 128256, 4096, 32, 32, 8, ffn_size=14336, max_seq_length=8192)


def config_of(model: ModelConfig = LARGE, batch: int = 64, **parallel: object) -> RunConfig:
    train = TrainConfig(global_batch_size=batch, micro_batch_size=1, precision="bf16")
    return RunConfig(model=model, parallel=ParallelConfig(**parallel), train=train)  # type: ignore[arg-type]


def test_splits_as_written() -> None:
    model = ModelConfig(num_layers=7)
    assert layers_per_stage(config_of(model, pipeline_parallel=3), 3) == even_split(7, 3)
    assert layers_per_stage(config_of(model, pipeline_parallel=3, stage_split="3, 4,0"), 3) == [3, 4, 0]
    for split in ("even", "auto", "3,4,0"):
        assert layers_per_stage(config_of(model, stage_split=split), 1) == [7]


def test_auto_counts_the_head_then_the_memory() -> None:
    """The head is 2.4 blocks of work: 34.4 / 4 stages. Stage 0 gets fewer: it has the embedding and most microbatches."""
    assert layers_per_stage(config_of(pipeline_parallel=4, stage_split="auto"), 4) == [8, 9, 9, 6]
    small_head = ModelConfig("llama", 1000, 4096, 32, 32, 8, ffn_size=14336)
    assert layers_per_stage(config_of(small_head, pipeline_parallel=4, stage_split="auto"), 4) == [8, 8, 8, 8]
    large_head = ModelConfig("llama", 128256, 2048, 16, 32, 8, ffn_size=8192)
    assert layers_per_stage(config_of(large_head, pipeline_parallel=8, stage_split="auto"), 8)[-1] == 0


def test_auto_counts_recomputation() -> None:
    config = config_of(pipeline_parallel=4, stage_split="auto")
    config.train.recompute = "full"  # blocks work a third more, the head does not
    assert layers_per_stage(config, 4)[-1] == 7


@pytest.mark.parametrize("schedule", ["gpipe", "bfs", "interleaved", "zbv", "dualpipev"])
def test_auto_works_with_every_schedule(schedule: str) -> None:
    chunks = 1 if schedule == "gpipe" else 2
    config = config_of(pipeline_parallel=4, chunks=chunks, schedule=schedule, stage_split="auto")
    split = layers_per_stage(config, 4 * chunks)
    assert sum(split) == 32 and len(split) == 4 * chunks and split[-1] <= min(split[1:-1])


def test_memory_by_hand() -> None:
    """1F1B with 2 ranks: the first holds 2 microbatches of 2 blocks, the second one of 2 blocks and the head."""
    model = ModelConfig("llama", 512, 64, 4, 4, ffn_size=192)
    first, second = predict_memory(config_of(model, pipeline_parallel=2, batch=8))
    tokens = 128  # of one microbatch
    block = count_block_activations(model, "none", 2, fused=True)
    assert first.activations == 2 * 2 * block * tokens
    assert second.activations == (2 * block + count_head_activations(model, 2)) * tokens
    weights = count_stage_parameters(model, 2, True, False)
    assert first.states.weights == 2 * weights and first.states.moments == 8 * weights
    assert first.total == first.states.total + first.activations


def test_recomputation_needs_one_block_whole() -> None:
    model = ModelConfig("llama", 512, 64, 4, 4, ffn_size=192)
    config = config_of(model, pipeline_parallel=2, batch=8)
    config.train.recompute, config.train.recompute_every = "full", 2
    whole, input_only = count_block_activations(model, "none", 2, fused=True), 64 * 2
    assert predict_memory(config)[0].activations == (2 * (whole + input_only) + whole - input_only) * 128


def test_memory_over_tensor_ranks_and_zero() -> None:
    one = predict_memory(config_of(pipeline_parallel=2))[0]
    cut = predict_memory(config_of(pipeline_parallel=2, tensor_parallel=8, sequence_parallel=True))[0]
    assert cut.states.weights * 8 == pytest.approx(one.states.weights)
    assert cut.activations < one.activations / 4
    raw = {"cluster": {"num_processes": 4}, "parallel": {"zero": 1, "zero_offload": "cpu"}}
    config = load(RunConfig, raw)
    (zero,) = predict_memory(config)
    assert zero.total == zero.states.weights + zero.states.gradients + zero.activations


PEAK = """
import json, torch
from megalm.config.model import ModelConfig
from megalm.config.run import RunConfig
from megalm.parallel.topology import Group, Topology
from megalm.train.build import build_stage

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

def build(model, stage, stages, tensor, dtype):
    config, one = RunConfig(model=model), Group((0,), 0)
    group = Group(tuple(range(tensor)), 0)
    topology = Topology(0, tensor, torch.device("cpu"), group, one, one, one, one)
    return build_stage(config, topology, stage, stages, dtype)

build(ModelConfig("llama", 64, 64, 1, 4), 0, 1, 1, torch.float32)  # torch's own start is not counted
model = ModelConfig("llama", 32000, 2048, 24, 16, ffn_size=5632)
found = []
for stage, tensor, dtype in ((5, 1, torch.bfloat16), (5, 2, torch.float32), (23, 1, torch.float32)):
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high water mark begins anew
    built = build(model, stage, 24, tensor, dtype)
    found.append((sum(p.nbytes for p in built.parameters()), status("VmHWM") - before))
    del built
print(json.dumps(found))
"""


def test_a_stage_never_needs_the_whole_model() -> None:
    """One of 24 stages of a model of 1.4e9 parameters: its own bytes, and where it keeps less than it draws, one whole tensor."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    largest, slack = 2048 * 5632 * 4, 32 << 20  # slack: what the allocator keeps for later
    whole = 4 * 1.36e9
    for (size, peak), extra in zip(json.loads(run.stdout), (largest, largest, 0), strict=True):
        print(f"stage {size / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB, whole model {whole / 2**20:.0f} MiB")
        assert size < peak + slack and peak < size + extra + slack
        assert peak < 0.12 * whole
