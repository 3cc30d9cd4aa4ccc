"""What is foretold of a run: layers per stage, memory per rank; and that building a stage takes no more than the stage."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megalm.config.load import load
from megalm.config.model import ModelConfig
from megalm.config.parallel import ParallelConfig
from megalm.config.run import RunConfig
from megalm.config.train import TrainConfig
from megalm.models.count import count_stage_parameters
from megalm.objectives.language_modeling import causal_loss
from megalm.parallel.collectives import all_reduce
from megalm.parallel.schedules import SCHEDULES, build_schedule
from megalm.parallel.split import even_split
from megalm.parallel.timeline import peaks
from megalm.parallel.topology import Topology
from megalm.parallel.weight_gradients import WeightGradients
from megalm.train import forecast
from megalm.train.build import DTYPES, build_stage
from megalm.train.forecast import layers_per_stage, predict_memory
from megalm.train.stage_memory import BlockMemory
from tests.parallel.simulated import simulate  # noqa: F401  a fixture
from tests.parallel.test_recompute import Made
from tests.parallel.tiny import alone

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


# Of a block of SMALL and one token, in bytes, fp32: 64 features or 192 (gate, up, silu, inner) of 4 bytes; torch's operators.
SMALL = ModelConfig("llama", 512, 64, 4, 4, ffn_size=192)
INPUT_ONLY, TOKENS = 64 * 4, 128
BLOCK = 10 * 256 + 4 * 768 + 2 * 4 + 16  # x, middle; both norms: scaled, result, scale; q, k, v, seen, logarithms; the MLP's four
HEAD = 3 * 256 + 4 + 512 * 4  # x, the norm's scaled, result and scale; probabilities
WAITING = 3 * 256 + 768 + 5 * 256 + 2 * 768  # what layers read: 2 norms, seen, inner; gradients of what they make
HEAD_WAITING = 256 + 2048


def small(batch: int = 8, **parallel: object) -> RunConfig:
    config = config_of(SMALL, batch, **parallel)
    config.train.precision, config.cluster.device = "fp32", "cpu"
    return config


def test_memory_by_hand() -> None:
    """1F1B with 2 ranks: the first holds 2 microbatches of 2 blocks, the second one of 2 blocks and the head."""
    first, second = predict_memory(small(pipeline_parallel=2))
    assert first.activations == 2 * 2 * BLOCK * TOKENS
    assert second.activations == (2 * BLOCK + HEAD) * TOKENS
    on_its_way = 5 * 256  # 4 sent and 1 received
    # In front of the product that made `inner`: it is gone, its gradient is there with those of silu and up, and that of y.
    assert first.temporary == (256 + 3 * 768 - 768 + on_its_way) * TOKENS
    assert second.temporary == (2 * 2048 + on_its_way) * TOKENS  # gradients of probabilities and logits
    weights = count_stage_parameters(SMALL, range(2), True, False)
    assert first.states.weights == 4 * weights and first.states.moments == 8 * weights
    assert first.total == first.states.total + first.activations + first.temporary


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_the_reference_of_attention_keeps_its_scores(mode: str) -> None:
    config = small()
    config.train.recompute = mode
    (usual,) = predict_memory(config)
    config.kernels.attention = "reference"
    (more,) = predict_memory(config)
    scores = 4 * TOKENS * 4  # of a token: heads, keys, bytes
    extra = {"none": 2 * scores, "selective": scores - 16}  # scores and shares; the shares are made again, not the logarithms
    assert more.activations - usual.activations == 4 * extra[mode] * TOKENS
    if mode == "selective":  # while a block's backward runs, all of it is there
        assert more.temporary > usual.temporary


@pytest.mark.parametrize("mode", ["none", "full"])
def test_weight_gradients_that_wait_hold_what_they_need(mode: str) -> None:
    """ZB-H1, last of 2 ranks: F0 I0 F1 I1 W0 F2 ...: one microbatch waits while the next goes forward, then both wait."""
    config = small(pipeline_parallel=2, schedule="zbh1")
    config.train.recompute = mode
    blocks = 2 * (BLOCK if mode == "none" else INPUT_ONLY)
    waiting = 2 * WAITING + HEAD_WAITING
    first, last = (rank.activations / TOKENS for rank in predict_memory(config))
    assert last == max(blocks + HEAD + waiting, 2 * waiting)
    assert first == max(2 * blocks, blocks + 2 * WAITING)  # F0 F1 I0 W0 F2 I1 W1 ...


def test_auto_counts_the_weight_gradients_that_wait() -> None:
    """With recomputation nearly all that ZB-H1 holds waits, the more the later the rank. 1F1B holds most on the first rank.

    The small head takes one layer from the last stage; which one gives another is the memory's choice.
    """
    model = ModelConfig("llama", 64, 4096, 30, 32, 8, ffn_size=14336)
    splits = {}
    for schedule in ("1f1b", "zbh1"):
        config = config_of(model, pipeline_parallel=4, schedule=schedule, stage_split="auto")
        config.train.recompute, config.data.seq_length = "full", 8192
        splits[schedule] = layers_per_stage(config, 4)
    assert splits == {"1f1b": [7, 8, 8, 7], "zbh1": [8, 8, 8, 6]}


@pytest.mark.parametrize("name", SCHEDULES)
def test_fewer_microbatches_show_as_much(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory and auto's counts are those of the whole schedule: of all microbatches, whatever their number."""
    chunks = 2 if name in ("bfs", "interleaved", "zbv", "dualpipev") else 1
    shortened = forecast._schedule
    for ranks, batch in itertools.product((2, 3, 5), (1, 3, 7, 16, 18, 19, 23, 64, 67)):
        config = config_of(pipeline_parallel=ranks, chunks=chunks, schedule=name, batch=batch)
        whole = build_schedule(name, ranks, batch, chunks)
        (schedule, times), memory = shortened(config), predict_memory(config)
        with monkeypatch.context() as patch:
            patch.setattr(forecast, "_schedule", lambda config, whole=whole: (whole, 1))
            expected = predict_memory(config)
        assert [rank.activations for rank in memory] == pytest.approx([rank.activations for rank in expected])
        moments = [{(times * n, times * m) for n, m in stage} for stage in forecast._fullest_moments(schedule)]
        assert moments == [set(stage) for stage in forecast._fullest_moments(whole)]
        assert [times * held for held in peaks(schedule)] == peaks(whole)


@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("bfs", 2)])
def test_schedules_that_hold_every_microbatch(schedule: str, chunks: int) -> None:
    few, many = (config_of(pipeline_parallel=4, chunks=chunks, schedule=schedule, batch=batch) for batch in (16, 512))
    for one, other in zip(predict_memory(few), predict_memory(many), strict=True):
        assert other.activations == 32 * one.activations > 0


def test_a_remainder_makes_the_rounds_of_interleaved_longer() -> None:
    """Narayanan et al. 2021 with 4 ranks: 19 microbatches go in rounds of 4 and 5; far beyond the limit as well."""
    held = {}
    for batch in (16, 19, 512, 515, 40_000, 40_003):
        config = config_of(pipeline_parallel=4, chunks=2, schedule="interleaved", batch=batch)
        held[batch] = predict_memory(config)[0].activations
    assert held[16] == held[512] == held[40_000] < held[19] == held[515] == held[40_003]


def test_the_line_names_every_pipeline_rank() -> None:
    config = config_of(pipeline_parallel=4)
    totals = [rank.total / 2**30 for rank in predict_memory(config)]
    line = forecast.describe_memory(config)
    assert f"about {max(totals):.3g} GiB at the peak" in line
    assert line.endswith(f"; pipeline ranks: {', '.join(f'{total:.3g}' for total in totals)}")
    assert "pipeline ranks" not in forecast.describe_memory(config_of())


def test_forecasts_are_quick() -> None:
    """512 microbatches on 16 ranks; processor time, so that what else runs here does not matter."""
    for schedule, chunks in (("gpipe", 1), ("interleaved", 4), ("zbv", 2)):
        before = time.process_time()
        predict_memory(config_of(batch=512, pipeline_parallel=16, schedule=schedule, chunks=chunks))
        assert time.process_time() - before < 1


def test_recomputation_needs_one_block_whole() -> None:
    """While its backward runs; every second block is recomputed, and only the first is here: the other is kept anyway."""
    config = small(pipeline_parallel=2)
    config.train.recompute, config.train.recompute_every = "full", 2
    assert predict_memory(config)[0].activations == 2 * (BLOCK + INPUT_ONLY) * TOKENS
    config.model = replace(SMALL, vocab_size=8)  # whose head needs little
    config.train.recompute_every, config.parallel.pipeline_parallel = 1, 1
    (rank,) = predict_memory(config)
    head = HEAD - 504 * 4
    assert rank.activations == (4 * INPUT_ONLY + head) * TOKENS
    # The last block is there whole, three others' inputs beside it, and the gradients as above; what the head kept is gone.
    assert rank.activations + rank.temporary == (3 * INPUT_ONLY + BLOCK + 256 + 3 * 768 - 768) * TOKENS


def test_memory_over_tensor_ranks_and_zero() -> None:
    one = predict_memory(config_of(pipeline_parallel=2))[0]
    cut = predict_memory(config_of(pipeline_parallel=2, tensor_parallel=8, sequence_parallel=True))[0]
    assert cut.states.weights * 8 == pytest.approx(one.states.weights, rel=1e-3)  # but for the norms
    assert cut.activations < one.activations / 4
    raw = {"cluster": {"num_processes": 4}, "parallel": {"zero": 1, "zero_offload": "cpu"}}
    config = load(RunConfig, raw)
    (zero,) = predict_memory(config)
    assert zero.total == zero.states.weights + zero.states.gradients + zero.activations + zero.temporary


def bytes_left(config: RunConfig, topology: Topology) -> tuple[int, int]:
    """After the input's half of a backward: bytes that wait in the queue, and all that is still there of what was made."""
    queue, tokens = WeightGradients(), torch.randint(64, (2, 65), generator=torch.Generator().manual_seed(0))
    stage = build_stage(config, topology, 0, 1, DTYPES[config.train.precision], queue=queue)
    for _ in range(2):  # selective recomputation learns in the first what it need not keep
        queue.take()
        with Made() as made:
            queue.hold()
            causal_loss(stage(tokens[:, :-1], samples=torch.arange(2)), tokens[:, 1:], topology.tensor, 64).backward()
        all_reduce(torch.zeros(1), topology.tensor)  # simulated ranks remember what they brought to the last collective
        stage.zero_grad()  # of biases, norms and embeddings
    waiting = queue.take()
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for _, *pair in waiting for tensor in pair}
    return sum(storages.values()), sum(nbytes for storage, nbytes in made.storages if not storage.expired())


@pytest.mark.parametrize("architecture", ["llama", "gpt"])
@pytest.mark.parametrize(
    ("size", "sequence", "mode", "precision"),
    [
        (1, False, "none", "fp32"),
        (1, False, "selective", "bf16"),
        (1, False, "full", "bf16"),
        (4, False, "full", "fp32"),
        (4, True, "none", "bf16"),
    ],
)
def test_what_waits_is_what_is_counted(
    simulate: Callable[..., list],  # noqa: F811
    architecture: str,
    size: int,
    sequence: bool,
    mode: str,
    precision: str,
) -> None:
    """In the queue, and beside it nothing: what the forward kept is gone. Four ranks have copies of two key/value heads."""
    model = ModelConfig(architecture, 64, 32, 3, 8, 2, 8, 96, 64, dropout=0.1 if architecture == "gpt" else 0.0)
    config = config_of(model, tensor_parallel=size, sequence_parallel=sequence)
    config.train.recompute, config.train.precision = mode, precision
    blocks = BlockMemory(config)
    counted = 3 * blocks.tape(0).waiting() + blocks.head().waiting()
    ranks = [bytes_left(config, alone())] if size == 1 else simulate(size, sequence, lambda t: bytes_left(config, t))
    for waiting, left in ranks:
        assert waiting == pytest.approx(counted, rel=0.01)
        assert left == pytest.approx(waiting, rel=0.03)


PEAK = """
import ctypes, gc, json, torch
from megalm.config.model import ModelConfig
from megalm.config.run import RunConfig
from megalm.parallel.topology import Group, tensor_topology
from megalm.train.build import build_stage

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

def build(model, stage, stages, tensor, dtype):
    topology = tensor_topology(Group(tuple(range(tensor)), 0), torch.device("cpu"))
    return build_stage(RunConfig(model=model), topology, stage, stages, dtype)

build(ModelConfig("llama", 64, 64, 1, 4), 0, 1, 1, torch.float32)  # torch's own start is not counted
model = ModelConfig("llama", 32000, 2048, 24, 16, ffn_size=5632)
found = []
for stage, tensor, dtype in ((5, 1, torch.bfloat16), (5, 2, torch.float32), (23, 1, torch.float32)):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the case before has freed goes back
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
