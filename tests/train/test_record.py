"""What a run records of one step, whatever its layout, and how two records are compared."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from megalm.train.divergence import compare_records, name_first
from megalm.train.pretrain import pretrain
from megalm.train.record import GRADIENT, OUTPUT, OUTPUT_GRADIENT, Piece, read_pieces

# --- the comparison, on records that are written by hand --------------------------------------------------------------

SHAPE = (4, 6)  # (S, F)
PARAMETERS = ("embedding", "layers.0.mlp.up", "norm")


def whole(name: str, kind: str, sample: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(hash((len(name), len(kind), sample)) % 2**31))


def write(folder: Path, rank: int, *pieces: Piece) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save([vars(piece) for piece in pieces], folder / f"rank-{rank}.pt")
    return folder


def part(name: str, kind: str, samples: list[int], rows: slice = slice(None), columns: slice = slice(None)) -> Piece:
    value = torch.stack([whole(name, kind, sample)[rows, columns] for sample in samples])
    return Piece(name, kind, value, (rows.start or 0, columns.start or 0), samples)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """A run on one rank: two samples, one after the other."""
    pieces = [part(n, OUTPUT, [s]) for s in (3, 5) for n in ("embedding", "layers.0", "head")]
    pieces += [part(n, OUTPUT_GRADIENT, [s]) for s in (3, 5) for n in ("head", "layers.0", "embedding")]
    pieces += [Piece(f"{n}.weight", GRADIENT, whole(n, GRADIENT, 0), (0, 0), []) for n in PARAMETERS]
    return write(tmp_path / "reference", 0, *pieces)


def test_parts_are_compared_with_their_place_in_the_whole(reference: Path, tmp_path: Path) -> None:
    """A slice of the sequence on one rank, a slice of the features on another, both samples in one batch."""
    other = write(tmp_path / "other", 0, part("embedding", OUTPUT, [5, 3], rows=slice(2, 4)))
    write(other, 1, part("head", OUTPUT, [3, 5], columns=slice(3, 5)), part("head", OUTPUT_GRADIENT, [3], rows=slice(1, 3)))
    found = compare_records(reference, other)
    assert [(d.name, d.kind, d.difference) for d in found] == [
        ("embedding", OUTPUT, 0.0), ("head", OUTPUT, 0.0), ("head", OUTPUT_GRADIENT, 0.0)
    ]  # fmt: skip
    assert name_first(reference, other, 2, "fp32", "k.bias").startswith("at step 2 every output, its gradient and every")


def spoiled(piece: Piece, by: float) -> Piece:
    piece.value[-1].view(-1)[0] += by
    return piece


def test_the_first_in_the_order_of_the_computation_is_named(reference: Path, tmp_path: Path) -> None:
    """Forward before backward before parameters; the backward begins at the head."""
    later = [
        spoiled(part("embedding", OUTPUT_GRADIENT, [3]), 9.0),
        spoiled(part("layers.0", OUTPUT_GRADIENT, [3]), 9.0),
        spoiled(Piece("norm.weight", GRADIENT, whole("norm", GRADIENT, 0), (0, 0), []), 9.0),
    ]
    other = write(tmp_path / "other", 0, *later)
    text = name_first(reference, other, 1, "fp32", "k.bias")
    assert text.startswith("first differing module at step 1: layers.0 (backward: the gradient of its output), by ")
    assert text.endswith("; sample 3")
    write(other, 1, spoiled(part("head", OUTPUT, [3, 5]), 9.0), spoiled(part("layers.0", OUTPUT, [5]), 9.0))
    assert "layers.0 (forward), by" in name_first(reference, other, 1, "fp32", "k.bias")


def test_parameters_are_named_in_the_order_of_the_backward(reference: Path, tmp_path: Path) -> None:
    wrong = [Piece(f"{n}.weight", GRADIENT, whole(n, GRADIENT, 0) + 1, (0, 0), []) for n in PARAMETERS]
    other = write(tmp_path / "other", 0, *wrong[:2])
    assert "layers.0.mlp.up.weight (gradient of the parameter)" in name_first(reference, other, 1, "fp32", "k.bias")
    assert "embedding.weight" in name_first(reference, other, 1, "fp32", "mlp.up.weight"), "left out by its name"
    write(other, 1, wrong[2])
    assert "norm.weight (gradient of the parameter)" in name_first(reference, other, 1, "fp32", "k.bias")


def test_a_difference_counts_from_a_part_of_the_largest_value_on(reference: Path, tmp_path: Path) -> None:
    size = max(float(whole("head", OUTPUT, s).abs().max()) for s in (3, 5))
    for factor, precision, named in ((5e-4, "fp32", False), (2e-3, "fp32", True), (2e-3, "bf16", False), (0.1, "bf16", True)):
        other = write(tmp_path / "other", 0, spoiled(part("head", OUTPUT, [3]), factor * size))
        text = name_first(reference, other, 1, precision, "k.bias")
        assert ("first differing" in text) == named and f"by {factor:.1e}"[:6] in text
    assert "forward), by inf" in name_first(
        reference, write(tmp_path / "nan", 0, spoiled(part("head", OUTPUT, [3]), float("nan"))), 1, "fp32", "k.bias"
    )


def test_nothing_in_common_is_said(reference: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", 0, part("layers.7", OUTPUT, [3]), part("head", OUTPUT, [8]))
    assert name_first(reference, other, 4, "fp32", "k.bias") == "no module of step 4 was recorded by both runs"
    assert read_pieces(tmp_path / "nowhere") == []


# --- what a run records ---------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(make, records, tmp_path: Path):
    """recorded(name, changes): the folder with the record of step 2 of a run of 3, and the run's losses."""

    def run(name: str, **changes) -> tuple[Path, list[float]]:
        folder = tmp_path / f"record-{name}"
        changes = {"train.steps": 3, "train.record": str(folder), "train.record_step": 2, "model.dropout": 0.1} | changes
        config = make(name, changes)
        pretrain(config)
        return folder, [record["loss"] for record in records(config)]

    return run


def test_a_run_records_every_sample_of_the_step_once(recorded) -> None:
    folder, losses = recorded("run")
    _, plain = recorded("plain", **{"train.record": "", "train.record_step": 1})
    assert losses == plain, "watching does not change the run"
    pieces = read_pieces(folder)
    seen = Counter((p.kind, p.name, sample) for p in pieces for sample in p.samples)
    assert set(seen.values()) == {1}
    samples = {sample for _, _, sample in seen}
    batch = len(samples)
    assert samples == set(range(batch, 2 * batch)), "of the second step"
    names = {p.name for p in pieces if p.kind == OUTPUT}
    assert {"embedding", "embedding_dropout", "layers.0.attention_norm", "layers.0.attention.out", "layers.1", "head"} <= names
    assert names == {p.name for p in pieces if p.kind == OUTPUT_GRADIENT}
    assert {"embedding.weight", "layers.1.mlp.down.weight"} <= {p.name for p in pieces if p.kind == GRADIENT}


def test_microbatches_of_another_size_and_recomputed_ones_record_the_same(recorded) -> None:
    whole, _ = recorded("whole")
    for name, changes in (
        ("ones", {"train.micro_batch_size": 1}),
        ("again", {"train.recompute": "full"}),
        ("fused", {"kernels.fuse_projections": True}),
    ):
        folder, _ = recorded(name, **changes)
        found = compare_records(whole, folder)
        kinds = Counter(d.kind for d in found)
        assert kinds[OUTPUT] > 10 and kinds[GRADIENT] > 10 and kinds[OUTPUT_GRADIENT] >= 4, name
        assert max(d.difference for d in found) < 1e-5, (name, max(found, key=lambda d: d.difference))


def test_the_loss_scale_is_not_in_the_record(recorded) -> None:
    """Of the first step: after it fp16 and fp32 are different runs."""
    whole, _ = recorded("whole", **{"train.record_step": 1})
    folder, _ = recorded("scaled", **{"train.record_step": 1, "train.precision": "fp16", "train.loss_scale": 4096.0})
    found = compare_records(whole, folder)
    assert Counter(d.kind for d in found)[OUTPUT_GRADIENT] >= 4
    assert max(d.difference for d in found) < 0.05, max(found, key=lambda d: d.difference)


@pytest.mark.dist
def test_latent_attention_over_two_ranks_records_what_one_does(recorded, make, command, tmp_path: Path) -> None:
    """Latents are whole inside the split region: their values are recorded, the parts of their gradients are not."""
    sizes = {"kv_latent_size": 12, "q_latent_size": 10, "rope_head_dim": 4, "value_head_dim": 6, "num_kv_heads": 4}
    model = {f"model.{name}": size for name, size in sizes.items()} | {"optim.warmup_steps": 2}
    whole, _ = recorded("whole", **model)
    changes = {"train.steps": 3, "train.record": str(tmp_path / "split"), "train.record_step": 2, "model.dropout": 0.1} | model
    done = command(make("split", {**changes, "parallel.tensor_parallel": 2}))
    assert done.returncode == 0, done.stderr
    found = compare_records(whole, tmp_path / "split")
    assert max(d.difference for d in found) < 1e-4, max(found, key=lambda d: d.difference)
    seen = {(d.name, d.kind) for d in found}
    for name in ("q_down", "q_norm", "kv_down", "kv_norm"):
        module = f"layers.1.attention.{name}"
        assert (module, OUTPUT) in seen and (f"{module}.weight", GRADIENT) in seen
        assert (module, OUTPUT_GRADIENT) not in seen
    assert ("layers.1.attention.kv_up", OUTPUT_GRADIENT) in seen
