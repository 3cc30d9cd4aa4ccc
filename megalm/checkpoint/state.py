"""What a run is, between two steps; saving and restoring it through the engine.

Random numbers need no state here: weights, dropout and data order are functions of seeds, names and sample numbers, so
`consumed_samples` and the seeds in the config say it all.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalm.checkpoint.reshard import read_box, read_whole
from megalm.checkpoint.sharded import Manifest, prune, publish, read_manifest, write_manifest, write_pieces
from megalm.errors import CheckpointError, Problem, writing
from megalm.parallel.engine import MOMENTS, WEIGHT, Engine
from megalm.parallel.loss_scale import LossScale
from megalm.parallel.tensor_parallel import shard_of

BUFFER = "buffer"  # beside the kinds of the parameters
_SHAPE_KEYS = (
    "architecture", "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size",
    "max_seq_length", "rope_theta", "norm_eps", "tie_embeddings", "window", "kv_latent_size", "q_latent_size", "rope_head_dim",
    "value_head_dim", "num_experts", "experts_per_token", "expert_ffn_size", "num_shared_experts", "num_dense_layers",
    "router_score", "router_normalize", "router_scale",
)  # fmt: skip


@dataclass
class RunState:
    """Progress of a run."""

    step: int = 0  # optimizer steps done
    consumed_samples: int = 0
    consumed_tokens: int = 0
    best_valid_loss: float | None = None  # none yet
    evaluations_without_gain: int = 0
    data_fingerprint: str = ""
    stopped_early: bool = False
    skipped_steps: int = 0  # fp16: of `step`, those that overflowed and changed nothing
    loss_scale: float | None = None  # fp16: for the next step
    loss_scale_clean_steps: int = 0  # fp16: since the scale last changed

    def note_scaling(self, loss_scale: LossScale | None, skipped: bool) -> None:
        """Keep what a step in fp16 changed, for the checkpoint."""
        if loss_scale is not None:
            self.loss_scale, self.loss_scale_clean_steps = loss_scale.scale, loss_scale.clean_steps
            self.skipped_steps += skipped

    def is_out_of_patience(self, patience: int) -> bool:
        """Whether early stopping ends the run; never with a patience of 0."""
        return bool(patience) and self.evaluations_without_gain >= patience


def save_checkpoint(root: Path, engine: Engine, state: RunState, config: dict[str, Any], keep: int) -> Path:
    """Write `root/step-NNNNNNNN`. Collective over all ranks; the parts of one parameter's copies are written by turns.

    Raises RunError if the file system refuses; the checkpoints before it are untouched.
    """
    with writing(root):
        return _save(root, engine, state, config, keep)


def _save(root: Path, engine: Engine, state: RunState, config: dict[str, Any], keep: int) -> Path:
    folder, topology = root / f"step-{state.step:08d}", engine.topology
    temporary = root / f".{folder.name}.tmp"
    if topology.rank == 0:
        prune(root, 0)
        temporary.mkdir(parents=True)
    dist.barrier()
    pieces = {}
    for index, name in enumerate(engine.parameters):
        shard = shard_of(engine.parameters[name])
        holders = engine.replicas(name)
        writes = index % holders.size == holders.rank and engine.stands_for_copies(name)
        for kind in _kinds(engine.steps_done):
            value = shard.real(engine.read(name, kind))  # collective over its holders
            if writes and value.numel():
                pieces[f"{kind}/{name}"] = (value.cpu(), shard.global_shape, shard.offset)
    if topology.data.is_first and topology.tensor.is_first:
        for name, buffer in engine.buffers.items():
            pieces[f"{BUFFER}/{name}"] = (buffer.cpu(), tuple(buffer.shape), (0,) * buffer.dim())
    write_pieces(temporary, topology.rank, pieces)
    dist.barrier()
    if topology.rank == 0:
        write_manifest(temporary, asdict(state), config, topology.world_size)
        publish(temporary, folder)
        prune(root, keep, folder)
    dist.barrier()
    return folder


def load_checkpoint(folder: Path, engine: Engine, model_config: dict[str, Any]) -> RunState:
    """Fill the engine from a checkpoint of any layout.

    Raises CheckpointError if it is damaged, or of a model of another shape (naming the keys that differ).
    """
    manifest = read_manifest(folder)
    check_same_model(folder, manifest, model_config)
    state = state_of(manifest)
    steps_done = state.step - state.skipped_steps  # of the optimizer
    if steps_done:
        engine.prepare_load(steps_done)
    if engine.loss_scale is not None and state.loss_scale is not None:
        engine.loss_scale.scale, engine.loss_scale.clean_steps = state.loss_scale, state.loss_scale_clean_steps
    for name, parameter in engine.parameters.items():
        shard, shape = shard_of(parameter), engine.shapes[name]
        for kind in _kinds(steps_done):
            key = f"{kind}/{engine.saved_name(name)}"
            value = shard.pad(read_box(folder, manifest, key, shard.offset, shard.real_shape(shape)))
            engine.write(name, kind, value.to(engine.topology.device))
    engine.finish_load()
    for name, buffer in engine.buffers.items():
        buffer.copy_(read_whole(folder, manifest, f"{BUFFER}/{name}"))
    return state


def state_of(manifest: Manifest) -> RunState:
    """The run's progress as the manifest tells it; unknown fields of a later version are left out."""
    known = {f.name for f in fields(RunState)}
    return RunState(**{key: value for key, value in manifest.state.items() if key in known})


def check_same_model(folder: Path, manifest: Manifest, model_config: dict[str, Any]) -> None:
    """Raise CheckpointError naming every key of the model's shape that differs."""
    saved = manifest.config["model"]
    problems = [
        Problem(
            f"model.{key}",
            model_config[key],
            f"the checkpoint {folder} has {saved.get(key)}",
            "",
            f"model.{key}={saved.get(key)}",
        )
        for key in _SHAPE_KEYS
        if saved.get(key, model_config[key]) != model_config[key]  # one of an earlier version does not know all keys
    ]
    if problems:
        raise CheckpointError(*problems)


def _kinds(steps_done: int) -> tuple[str, ...]:
    """Before the first step an optimizer has no moments."""
    return (WEIGHT, *MOMENTS) if steps_done else (WEIGHT,)
