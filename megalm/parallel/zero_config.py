"""What DeepSpeed is told: its configuration, the grid of ranks, and how it is imported."""

from __future__ import annotations

import logging
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalm.config.parallel import ParallelConfig
from megalm.doctor import missing_for_nvme
from megalm.errors import Problem, RunError, writing
from megalm.log import log
from megalm.parallel.memory import BUCKET_ELEMENTS
from megalm.parallel.topology import Topology


class ModelParallelUnit:
    """The grid as DeepSpeed wants to hear of it. Model parallel means all ranks of one copy: pipeline x tensor."""

    def __init__(self, topology: Topology):
        alone = dist.new_group([topology.rank], use_local_synchronization=True)
        axes = {"model": "model", "data": "data", "tensor_model": "tensor", "pipeline_model": "pipeline"}
        for prefix, axis in axes.items():
            group = getattr(topology, axis)
            answers = {"rank": group.rank, "group": group.handle or alone, "world_size": group.size}
            for what, answer in answers.items():
                setattr(self, f"get_{prefix}_parallel_{what}", lambda answer=answer: answer)
        self.get_data_parallel_group_ranks = lambda: list(topology.data.ranks)


def deepspeed_config(
    parallel: ParallelConfig,
    precision: torch.dtype,
    clip: float,
    accumulate_fp32: bool = True,
    elements: int = BUCKET_ELEMENTS,
    device: str = "cpu",
) -> dict[str, Any]:
    """The whole DeepSpeed configuration, from typed settings; a user's dict never reaches DeepSpeed, which ignores typos.

    elements: of this rank's parameters; a bucket needs no more.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only multiplies it; the batch is the loader's business
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "steps_per_print": 10**9,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # our own AdamW steps on the CPU too
        "zero_optimization": _zero_section(parallel, min(BUCKET_ELEMENTS, elements), device),
    }
    if precision == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    if precision == torch.float16:
        config["fp16"] = {"enabled": True, "loss_scale": 1.0}  # the scale is ours: see ZeroEngine.step
    if precision != torch.float32 and accumulate_fp32:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _zero_section(parallel: ParallelConfig, bucket: int, device: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": parallel.zero, "overlap_comm": False, "reduce_bucket_size": bucket}
    if parallel.zero == 3:
        # memory_efficient_linear would replace torch.nn.functional.linear in the whole process and round biases twice.
        zero |= {"memory_efficient_linear": False, "stage3_param_persistence_threshold": 0}
        zero |= {"zero_hpz_partition_size": parallel.zero_node_size} if parallel.zero_node_size else {}
        if parallel.zero_quantized:
            zero |= {"zero_quantized_weights": True, "zero_quantized_gradients": True}
    if parallel.zero_offload != "none":
        zero["offload_optimizer"] = {"device": parallel.zero_offload, "pin_memory": device == "cuda"}
        if parallel.zero_offload == "nvme":
            zero["offload_optimizer"]["nvme_path"] = parallel.zero_offload_path
    return zero


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without two things that cost seconds at the start of every rank and serve nothing here.

    Its shared memory op compiles for 70 s at first use, for inference only. Its Muon optimizer is imported by every engine,
    for an isinstance check, its update by the reduction of stages 1 and 2, for nothing, and each pulls in torch.compile: 1 s,
    and 4 s where four ranks share two cores.
    """
    muon = types.ModuleType("deepspeed.runtime.zero.muon.muon_optimizer")
    muon.MuonWithAuxAdam = type("MuonWithAuxAdam", (torch.optim.Optimizer,), {})  # type: ignore[attr-defined]
    sys.modules.setdefault(muon.__name__, muon)
    update = types.ModuleType("deepspeed.runtime.zero.muon.original_muon")
    update.muon_update = None  # type: ignore[attr-defined]
    sys.modules.setdefault(update.__name__, update)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="deepspeed")
    import deepspeed
    from deepspeed.runtime import bf16_optimizer

    deepspeed.utils.logger.setLevel(logging.ERROR)
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None  # it prints to the console, a dozen times
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def prepare_nvme(folder: str) -> None:
    """Make the folder; raise RunError if it cannot be made, or if what DeepSpeed builds its disk access from is absent."""
    missing = missing_for_nvme()
    if missing:
        rule = f"nvme needs {' and '.join(missing)} on every machine, to build DeepSpeed's access to the disk"
        fix = f"apt-get install {' '.join(missing)}, or parallel.zero_offload=cpu"
        raise RunError(Problem("parallel.zero_offload", "nvme", rule, "", fix))
    with writing(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    log("the first start with parallel.zero_offload=nvme compiles for some minutes")


def make_node_groups(topology: Topology, node_size: int) -> Any:
    """This rank's group of `node_size` neighbours among the copies (hpZ), known to DeepSpeed from here on. Collective.

    DeepSpeed's own are cut from the whole world, where tensor and pipeline ranks lie between the copies.
    """
    if not node_size:
        return None
    from deepspeed.utils import groups

    def blocks(ranks: tuple[int, ...]) -> list[list[int]]:
        return [list(ranks[i : i + node_size]) for i in range(0, len(ranks), node_size)]

    mine = next(block for block in blocks(topology.data.ranks) if topology.rank in block)
    known = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP
    if known is None or dist.get_process_group_ranks(known) != mine:
        everyones: list[tuple[int, ...]] = [()] * topology.world_size
        dist.all_gather_object(everyones, topology.data.ranks)
        for block in (block for ranks in dict.fromkeys(everyones) for block in blocks(ranks)):
            group = dist.new_group(block)  # every rank takes part in making every group
            if block == mine:
                groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = group
    return groups._ZERO_PARAM_INTRA_PARALLEL_GROUP
