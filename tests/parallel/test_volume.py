"""The formulae of communication against numbers worked out by hand. That real runs send so much: train/test_counting.py."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from megalm.config.cluster import ClusterConfig
from megalm.config.data import DataConfig
from megalm.config.model import ModelConfig
from megalm.config.parallel import ParallelConfig, parse_layout
from megalm.config.run import RunConfig
from megalm.config.train import TrainConfig
from megalm.models.plans import PLANS
from megalm.models.shapes import stage_shapes
from megalm.parallel.schedules import build_schedule
from megalm.parallel.volume import Count, Volume, is_covered
from megalm.parallel.volume_parts import cut
from megalm.train.traffic import forecast_volume

B, S, E, V, L, M = 2, 16, 64, 96, 4, 4  # M microbatches on each copy
HIDDEN = B * S * E * 2  # bytes in bf16
BLOCK = 4 * E * E + 3 * E * 128  # elements of the matrices of a llama block


def run_config(layout: str, model: dict | None = None, **train) -> RunConfig:
    values, copies = parse_layout(layout)
    parallel = ParallelConfig(**values)  # type: ignore[arg-type]
    settings = {"micro_batch_size": B, "global_batch_size": B * M * copies, "precision": "bf16"} | train
    return RunConfig(
        model=ModelConfig("llama", V, E, L, num_heads=4, ffn_size=128, **(model or {})),
        parallel=parallel,
        data=DataConfig(seq_length=S),
        train=TrainConfig(**settings),
        cluster=ClusterConfig(num_processes=parallel.ranks_per_sample * copies),
    )


def volume_of(layout: str, rank: int = 0, model: dict | None = None, **train) -> Volume:
    config = run_config(layout, model, **train)
    p = config.parallel
    schedule = build_schedule(p.schedule, p.pipeline_parallel, config.num_microbatches, p.chunks)
    return forecast_volume(config, schedule, rank)


def test_one_rank_sends_nothing() -> None:
    assert volume_of("single") == {}


def test_tensor_parallel() -> None:
    """Per microbatch and layer two all-reduces forward and two backward; one each for embedding and head; two small ones."""
    volume = volume_of("tp2")
    big, small = M * (4 * L + 2), M * 2
    assert volume == {
        ("model", "all_reduce"): Count(1, 8),
        ("tensor", "all_reduce"): Count(big + small, big * HIDDEN + M * 3 * B * S * 4),
    }


def test_sequence_parallel_has_the_same_bytes_on_the_wire() -> None:
    """Each all-reduce becomes an all-gather and a reduce-scatter; besides, gradients of the 2 L + 1 norms are summed once."""
    volume, count = volume_of("tp2_sp"), M * (4 * L + 2)
    assert volume["tensor", "all_gather"] == volume["tensor", "reduce_scatter"] == Count(count, count * HIDDEN)
    assert volume["tensor", "all_reduce"] == Count(2 * M + 1, M * 3 * B * S * 4 + (2 * L + 1) * E * 4)


def test_recomputation_repeats_the_forward() -> None:
    """A block's forward has two all-reduces, of which the last one is not needed; every second of 4 blocks."""
    plain, full = (volume_of("tp2", recompute=r)["tensor", "all_reduce"] for r in ("none", "full"))
    half = volume_of("tp2", recompute="full", recompute_every=2)["tensor", "all_reduce"]
    assert (full.calls - plain.calls, half.calls - plain.calls) == (M * L, M * L // 2)
    assert full.bytes - plain.bytes == M * L * HIDDEN
    assert volume_of("tp2", recompute="selective")["tensor", "all_reduce"] == plain


@pytest.mark.parametrize(("layout", "boundaries"), [("pp2", 1), ("pp2_interleaved", 3), ("pp2_zbv", 2), ("pp2_bfs", 3)])
def test_pipeline(layout: str, boundaries: int) -> None:
    """What crosses a boundary between the two ranks goes one way as an activation, the other way as its gradient."""
    volumes = [volume_of(layout, rank) for rank in (0, 1)]
    assert volumes[0]["pipeline", "send"] == volumes[1]["pipeline", "recv"]
    assert volumes[1]["pipeline", "send"] == volumes[0]["pipeline", "recv"]
    assert volumes[0]["pipeline", "send"] == Count(M * boundaries, M * boundaries * HIDDEN)
    assert volumes[0]["pipeline", "all_reduce"] == Count(1, 4), "the loss"


def test_sequence_parallel_stages_hand_on_slices() -> None:
    assert volume_of("tp2_sp_pp2")["pipeline", "send"] == Count(M, M * HIDDEN // 2)


@pytest.mark.parametrize(("layout", "hops", "sums"), [("cp2_ring", 2, 2), ("cp4_ring", 6, 4), ("tp2_cp2_ring", 2, 2)])
def test_a_ring(layout: str, hops: int, sums: int) -> None:
    """Per layer and microbatch keys and values n - 1 times each way, the sums of their gradients n times, in fp32."""
    volume, ranks = volume_of(layout), 4 if layout != "cp2_ring" else 2
    both = 2 * HIDDEN // ranks  # this rank's tokens and heads
    expected = Count(M * L * (hops + sums), M * L * (hops + 2 * sums) * both)
    assert volume["context", "send"] == volume["context", "recv"] == expected
    again = volume_of(layout, recompute="full")["context", "send"]
    assert again.calls - volume["context", "send"].calls == M * L * hops // 2, "the forward's"


def test_what_ranks_of_a_sample_have_less_of() -> None:
    """Activations on the wire are those of a rank's tokens; weights are copies, whether ranks share samples or not."""
    half, whole = volume_of("tp2_pp2_cp2_ring"), volume_of("tp2_pp2")
    assert 2 * half["pipeline", "send"].bytes == whole["pipeline", "send"].bytes
    assert 2 * half["tensor", "all_reduce"].bytes == whole["tensor", "all_reduce"].bytes
    assert volume_of("cp2_ring_zero1")["data", "all_gather"] == volume_of("dp2_zero1")["data", "all_gather"]


@pytest.mark.parametrize(("kv_heads", "exchanged"), [(4, 4), (2, 2), (1, 2)])
def test_heads_change_places_with_tokens(kv_heads: int, exchanged: int) -> None:
    """q, k and v in one call, the result in another, each way; a key/value head of two ranks goes to both."""
    found = volume_of("cp2_ulysses", model={"num_kv_heads": kv_heads})["context", "all_to_all"]
    assert found == Count(4 * M * L, 2 * M * L * (4 + 2 * exchanged + 4) * HIDDEN // 2 // 4)


def test_experts() -> None:
    """Counts, rows there, rows back, in the backward the rows again; three of four blocks. Their copies are fewer."""
    experts = {"num_experts": 8, "experts_per_token": 3, "expert_ffn_size": 40, "num_dense_layers": 1}
    volume, matrices = volume_of("dp4_ep2", model=experts), 3 * 8 * 3 * 40 * E
    assert volume["expert", "all_to_all"] == Count(3 * M * 5, 3 * M * (8 * 8 + 4 * 3 * HIDDEN), exact=False)
    assert volume["expert_data", "all_reduce"] == Count(1, 4 * matrices // 2)
    assert volume["expert", "all_reduce"] == Count(1, 8), "the norm"
    whole = volume_of("dp4", model=experts)
    assert whole["data", "all_reduce"].bytes - volume["data", "all_reduce"].bytes == 4 * matrices
    assert ("expert_data", "all_gather") in volume_of("dp4_ep2_zero1", model=experts)
    dropping = volume_of("dp4_ep2", model=experts | {"capacity_factor": 0.5})
    assert dropping["expert", "all_to_all"].bytes - 3 * M * 64 == (volume["expert", "all_to_all"].bytes - 3 * M * 64) // 2


def test_a_microbatch_that_ranks_share_is_routed_as_a_whole() -> None:
    experts = {"num_experts": 8, "router_aux_loss": 0.1, "capacity_factor": 2.0}
    volume = volume_of("cp2_ring", model=experts)
    assert volume["context", "all_reduce"] == Count(M * L, M * L * 8 * 8), "loads"
    assert volume["context", "all_gather"] == Count(M * L, M * L * B * S * 2 * 8), "choices"


def test_copies() -> None:
    """Gradients once in fp32, all of them; ZeRO adds the new weights in bf16, ZeRO-3 gathers them in every pass instead."""
    matrices, vectors = 2 * V * E + L * BLOCK, (2 * L + 1) * E
    everything = matrices + vectors
    small = 8 + 4  # tokens that count, and the loss
    assert volume_of("dp2") == {("data", "all_reduce"): Count(2 + 2, 4 * everything + small)}
    one = volume_of("dp2_zero1")
    assert one["data", "all_reduce"] == Count(1 + 2, 4 * everything + small)
    assert one["data", "all_gather"] == Count(2, 2 * everything)
    three = volume_of("dp2_zero3")
    assert three["data", "reduce_scatter"] == Count(1, 4 * everything)
    assert three["data", "all_gather"] == Count(2 * M * (3 + 9 * L), 2 * M * everything * 2), "each module in each pass"


def test_reducing_in_the_backward_multiplies_the_gradients() -> None:
    once, each = volume_of("dp2_zero3"), volume_of("dp2_zero3_microbatch")
    assert each["data", "reduce_scatter"] == Count(M, M * once["data", "reduce_scatter"].bytes)
    assert each["data", "all_gather"] == once["data", "all_gather"]


def test_many_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket is sent before it would become too large; two matrices of a head or an MLP do not fit together."""
    monkeypatch.setattr("megalm.parallel.volume_data.BUCKET_ELEMENTS", 3 * E * 128)
    one, many = volume_of("dp2_zero2"), volume_of("dp2_zero2", precision="fp32")
    assert one["data", "all_reduce"].bytes == many["data", "all_reduce"].bytes + 1  # bf16 looks for an overflow
    # embedding + q; k v out gate; up down q k; v out gate up; down q k v; ... : 6144 + 4096, 24576 at most
    sizes = [V * E] + [E * E] * 4 + [E * 128] * 3
    assert many["data", "all_reduce"].calls == _buckets([sizes[0], *(sizes[1:] * L), V * E, *[E] * (2 * L + 1)], 3 * E * 128) + 4


def _buckets(sizes: list[int], limit: int) -> int:
    count, filled = 1, 0
    for size in sizes:
        if filled + size > limit:
            count, filled = count + 1, 0
        filled += size
    return count


def test_copies_of_heads_are_summed_as_a_whole_and_the_vocabulary_is_padded() -> None:
    config = run_config("tp4")
    config.model = replace(config.model, num_kv_heads=2, vocab_size=97)
    parts = {p.name: p for p in cut(stage_shapes(config.model, range(1)), PLANS["llama"], config)}
    k, head, norm = parts["layers.0.attention.k.weight"], parts["head.weight"], parts["norm.weight"]
    assert (k.numel, k.partial) == (16 * E, 2 * 16 * E), "4 ranks hold 2 heads of 16"
    assert (head.numel, head.partial) == (25 * E, 0)
    assert (norm.numel, norm.partial, norm.is_matrix) == (E, 0, False)
    assert parts["layers.0.mlp.down.weight"].numel == E * 128 // 4


@pytest.mark.parametrize("change", [{"zero_offload": "cpu"}, {"zero_node_size": 2}, {"zero_quantized": True}])
def test_what_has_no_formula(change: dict) -> None:
    config = run_config("dp2_zero3")
    assert is_covered(config)
    for key, value in change.items():
        setattr(config.parallel, key, value)
    assert not is_covered(config)


def test_without_torch() -> None:
    code = "import sys, megalm.train.traffic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
