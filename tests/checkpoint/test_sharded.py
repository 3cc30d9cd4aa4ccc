"""The format on disk: what was written comes back, and every kind of damage is a CheckpointError."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalm.checkpoint import sharded
from megalm.checkpoint.reshard import read_whole
from megalm.checkpoint.sharded import (
    LATEST,
    MANIFEST,
    find_checkpoint,
    prune,
    publish,
    read_manifest,
    write_manifest,
    write_pieces,
)
from megalm.errors import CheckpointError

STATE, CONFIG = {"step": 7, "best_valid_loss": float("inf")}, {"model": {"hidden_size": 6}, "data": {"path": "\u00fcber"}}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"weight/a.weight": (6, 4), "weight/a.bias": (6,), "exp_avg/a.weight": (6, 4), "weight/scalar": (1,)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def write(folder: Path, ranks: int = 2) -> Path:
    """A checkpoint of two ranks: each has half of every matrix, rank 0 has the vectors."""
    folder.mkdir(parents=True)
    for rank in range(ranks):
        pieces = {}
        for key, whole in tensors().items():
            if whole.dim() == 2:
                length = whole.shape[0] // ranks
                pieces[key] = (whole.narrow(0, rank * length, length), tuple(whole.shape), (rank * length, 0))
            elif rank == 0:
                pieces[key] = (whole, tuple(whole.shape), (0,))
        write_pieces(folder, rank, pieces)
    write_manifest(folder, STATE, CONFIG)
    return folder


def load(folder: Path) -> tuple[dict[str, Tensor], dict, dict]:
    manifest = read_manifest(folder)
    return {key: read_whole(folder, manifest, key) for key in manifest.tensors}, manifest.state, manifest.config


def assert_intact(loaded: tuple[dict[str, Tensor], dict, dict]) -> None:
    found, state, config = loaded
    expected = tensors()
    assert set(found) == set(expected)
    for key in expected:
        assert found[key].numpy().tobytes() == expected[key].numpy().tobytes(), key
    assert (state, config) == (STATE, CONFIG)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pristine") / "step-00000007")


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / pristine.name))


def test_round_trip_to_the_bit(pristine: Path) -> None:
    assert_intact(load(pristine))
    names = sorted(path.name for path in pristine.iterdir())
    assert names == [MANIFEST, "rank-00000.safetensors", "rank-00001.safetensors"], "no notes are left"


@pytest.mark.parametrize("values", [[float("nan"), float("inf"), -0.0, 1e-45], []])
def test_odd_numbers_survive(values: list[float], tmp_path: Path) -> None:
    x = torch.tensor(values)
    write_pieces(tmp_path, 0, {"weight/x": (x, tuple(x.shape), (0,))})
    write_manifest(tmp_path, {}, {})
    assert read_whole(tmp_path, read_manifest(tmp_path), "weight/x").numpy().tobytes() == x.numpy().tobytes()


def test_views_of_one_buffer_are_written_one_by_one(tmp_path: Path) -> None:
    """The engines' parameters are views of flat buffers; a transposed one is not contiguous."""
    flat = torch.arange(24.0)
    parts = {"weight/a": flat[:12].view(3, 4), "weight/b": flat[12:].view(4, 3).T}
    write_pieces(tmp_path, 0, {key: (x, tuple(x.shape), (0, 0)) for key, x in parts.items()})
    write_manifest(tmp_path, {}, {})
    for key, x in parts.items():
        assert torch.equal(read_whole(tmp_path, read_manifest(tmp_path), key), x)


@pytest.mark.parametrize("seed", range(4))
def test_every_flipped_bit_is_caught_or_harmless(seed: int, copy: Path) -> None:
    """100 bits per seed, in files drawn evenly: a CheckpointError, or the very same tensors. Never another exception."""
    draw, caught, files = random.Random(seed), 0, sorted(copy.iterdir())
    for trial in range(100):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        # Half of the flips hit the first 200 bytes, where the sizes and names are.
        place = draw.randrange(min(200, len(whole)) if trial % 2 else len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert_intact(load(copy))
        except CheckpointError as error:
            assert str(path) in str(error)
            caught += 1
        finally:
            path.write_bytes(whole)
    assert caught >= 95, "nearly every byte matters"
    assert_intact(load(copy))


def test_every_bit_of_a_tensor_is_watched(copy: Path) -> None:
    path = copy / "rank-00001.safetensors"
    whole = path.read_bytes()
    for place in range(len(whole) - 2 * 3 * 4 * 4, len(whole)):  # two half matrices of 12 fp32 numbers at the end
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="CRC-32"):
            load(copy)


@pytest.mark.parametrize("name", [MANIFEST, "rank-00000.safetensors", "rank-00001.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated(name: str, share: float, copy: Path) -> None:
    path = copy / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=name):
        load(copy)


@pytest.mark.parametrize("name", [MANIFEST, "rank-00000.safetensors", "rank-00001.safetensors"])
def test_missing(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=name) as caught:
        load(copy)
    assert "another train.run_dir" in str(caught.value)


def test_a_shard_of_another_checkpoint(copy: Path) -> None:
    """The right names and shapes, other numbers."""
    write_pieces(copy, 1, {key: (torch.zeros(3, 4), (6, 4), (3, 0)) for key in ("weight/a.weight", "exp_avg/a.weight")})
    with pytest.raises(CheckpointError, match="CRC-32"):
        load(copy)


def rewrite(folder: Path, **changes: object) -> None:
    """Change the manifest as someone who also mends its checksum."""
    envelope = json.loads((folder / MANIFEST).read_text())
    content = {**envelope["manifest"], **changes}
    envelope = {"crc32": sharded._text_crc(content), "manifest": content}
    (folder / MANIFEST).write_text(json.dumps(envelope))


def test_another_format(copy: Path) -> None:
    rewrite(copy, format=2)
    with pytest.raises(CheckpointError, match="format 1"):
        load(copy)


@pytest.mark.parametrize(
    "text", ["", "\n", "[]", "3", '{"crc32": 1}', '{"manifest": {}}', '{"crc32": 0, "manifest": []}', "\x00\xff"]
)
def test_a_manifest_that_is_none(text: str, copy: Path) -> None:
    (copy / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=MANIFEST):
        load(copy)


def test_find_a_checkpoint_or_the_latest_of_a_run(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    for step in (1, 2):
        publish(write(root / ".new"), root / f"step-{step:08d}")
    assert find_checkpoint(root / "step-00000001") == root / "step-00000001"
    for path in (root, tmp_path / "run"):
        assert find_checkpoint(path) == root / "step-00000002"
    with pytest.raises(CheckpointError, match="train first"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"generate.checkpoint=.*run$"):
        find_checkpoint(tmp_path / "rum", "generate.checkpoint")


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"step-00000009\n", b"step-0000\x00001\n", b"\xffstep", b"..\n", b"../step-00000001", b"/"]
)
def test_a_latest_that_names_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    publish(write(tmp_path / ".new"), tmp_path / "step-00000001")
    (tmp_path / LATEST).write_bytes(content)
    with pytest.raises(CheckpointError, match="must name a complete checkpoint") as caught:
        find_checkpoint(tmp_path)
    assert str(tmp_path / LATEST) in str(caught.value)


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 10]), (1, [10]), (2, [3, 10]), (9, [1, 2, 3, 10])])
def test_prune_keeps_the_newest(keep: int, left: list[int], tmp_path: Path) -> None:
    for step in (10, 2, 1, 3):
        write(tmp_path / f"step-{step:08d}")
    (tmp_path / ".step-00000004.tmp").mkdir()
    (tmp_path / ".step-00000004.tmp" / "rank-00000.safetensors").write_text("half")
    (tmp_path / "notes.txt").write_text("mine")
    prune(tmp_path, keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", *(f"step-{step:08d}" for step in left)]


def test_a_half_deleted_checkpoint_has_lost_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        write(tmp_path / f"step-{step:08d}")

    def stop(path: Path) -> None:
        (path / "rank-00000.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(sharded.shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]
    monkeypatch.undo()
    prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_run_that_went_back_keeps_what_it_saves(tmp_path: Path) -> None:
    """Steps 1 to 3 are there, the run resumes at 1 and saves 2 anew: 3 is of a future that is no more."""
    for step in (1, 2, 3):
        publish(write(tmp_path / ".new"), tmp_path / f"step-{step:08d}")
    again = tmp_path / "step-00000002"
    publish(write(tmp_path / ".new"), again)
    prune(tmp_path, 1, again)
    assert find_checkpoint(tmp_path) == again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


def test_a_checkpoint_without_a_ranks_files_is_not_written(tmp_path: Path) -> None:
    folder = write(tmp_path / "whole")
    (folder / "manifest.json").unlink()
    for rank, rows in enumerate(torch.randn(4, 2).split(2)):
        write_pieces(folder, rank, {"weight/x": (rows, (4, 2), (2 * rank, 0))})
    (folder / "rank-00001.json").unlink()
    with pytest.raises(OSError, match="1 of 2 ranks' files"):
        write_manifest(folder, STATE, CONFIG, 2)
    with pytest.raises(OSError, match="do not cover"):
        write_manifest(folder, STATE, CONFIG)
    assert not (folder / "manifest.json").exists()
