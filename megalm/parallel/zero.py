"""DeepSpeed's ZeRO stages 1 to 3 behind the Engine interface: the only file that knows DeepSpeed.

DeepSpeed partitions, reduces, clips and steps; it does not run the model. The pipeline executor calls the chunks
directly, so `.grad` fills up on plain parameters, and one reduction flushes them. The usual way (`engine(x)`,
`engine.backward`) is wrong here in ways that mostly do not raise:

- with accumulation steps > 1 its output hooks divide the gradient once more at every pipeline stage, so the accumulation
  in its config is 1 and the loss is scaled by us;
- under ZeRO-3 its root forward broadcasts over the whole world and hangs with pipeline stages, so the root is never run;
- per-microbatch reduction under ZeRO-3 adds into the last step's shard for a chunk whose backward is not the step's first;
- bf16 gradients are accumulated and sent in bf16 unless `.grad` itself is fp32 (`grad_dtype`) and the communication type too;
- ZeRO-3's norm takes the rank in the whole model where the tensor rank is meant, and counts tied copies twice.

tests/parallel/test_zero_traps.py watches each of these facts.
"""

from __future__ import annotations

import logging
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.parallel.engine import WEIGHT, Engine, MakeOptimizer, ParameterGroup, Tie, initial_state
from megalm.parallel.tensor_parallel import shard_of
from megalm.parallel.topology import Topology


class ModelParallelUnit:
    """The grid as DeepSpeed wants to hear of it. Model parallel means all ranks of one copy: pipeline x tensor."""

    def __init__(self, topology: Topology):
        alone = [dist.new_group([rank]) for rank in range(topology.world_size)][topology.rank]  # collective
        axes = {"model": "model", "data": "data", "tensor_model": "tensor", "pipeline_model": "pipeline"}
        for prefix, axis in axes.items():
            group = getattr(topology, axis)
            answers = {"rank": group.rank, "group": group.handle or alone, "world_size": group.size}
            for what, answer in answers.items():
                setattr(self, f"get_{prefix}_parallel_{what}", lambda answer=answer: answer)
        self.get_data_parallel_group_ranks = lambda: list(topology.data.ranks)


def deepspeed_config(stage: int, precision: torch.dtype, clip: float) -> dict[str, Any]:
    """The whole DeepSpeed configuration, from typed settings; a user's dict never reaches DeepSpeed, which ignores typos."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    if stage == 3:
        # memory_efficient_linear would replace torch.nn.functional.linear in the whole process and round biases twice.
        zero |= {"memory_efficient_linear": False, "stage3_param_persistence_threshold": 0}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only multiplies it; the batch is the loader's business
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "steps_per_print": 10**9,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    if precision == torch.bfloat16:
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return config


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without two things that cost seconds at the start of every rank and serve nothing here.

    Its shared memory op compiles for 70 s at first use, for inference only. Its Muon optimizer is imported by every engine,
    for an isinstance check, and pulls in torch.compile: 1 s, and 4 s where four ranks share two cores.
    """
    muon = types.ModuleType("deepspeed.runtime.zero.muon.muon_optimizer")
    muon.MuonWithAuxAdam = type("MuonWithAuxAdam", (torch.optim.Optimizer,), {})  # type: ignore[attr-defined]
    sys.modules.setdefault(muon.__name__, muon)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="deepspeed")
    import deepspeed
    from deepspeed.runtime import bf16_optimizer

    deepspeed.utils.logger.setLevel(logging.ERROR)
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None  # it prints to the console, a dozen times
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class ZeroEngine(Engine):
    """ZeRO-1 (optimizer state), 2 (+ gradients) or 3 (+ weights) over the data parallel group."""

    def __init__(
        self,
        module: nn.Module,
        groups: list[ParameterGroup],
        make_optimizer: MakeOptimizer,
        topology: Topology,
        clip: float,
        stage: int,
        tie: Tie | None = None,
    ):
        super().__init__(groups, topology, tie)
        self.stage, self._moments_linked = stage, False
        precision = next(iter(self.parameters.values())).dtype
        self.low_precision = precision != torch.float32
        for name, parameter in self.parameters.items():
            parameter.tensor_model_parallel = shard_of(parameter).dim is not None  # type: ignore[attr-defined]
            parameter.ds_pipe_replicated = self.saved_name(name) != name  # type: ignore[attr-defined]
            if self.low_precision:
                parameter.grad_dtype = torch.float32
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        optimizer = make_optimizer(
            [{"params": list(g.parameters.values()), "weight_decay": g.weight_decay} for g in groups]
        )
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(stage, precision, clip),
            mpu=ModelParallelUnit(topology),
        )
        self._check_understood(precision, clip)
        self.aliased = type(self.optimizer).__name__ == "BF16_Optimizer"  # bf16 ZeRO-1: flat fp32 gradients of its own
        if stage == 2 and self.low_precision:
            self.optimizer.use_grad_accum_attribute = True  # else gradients pass through a bf16 bucket
        if stage == 3:
            self._correct_stage3_norm()

    def _check_understood(self, precision: torch.dtype, clip: float) -> None:
        """DeepSpeed takes defaults for keys it does not know, without a word: compare what it says with what was meant."""
        engine = self.deepspeed
        understood = {
            "stage": engine.zero_optimization_stage() == self.stage,
            "gradient_accumulation_steps": engine.gradient_accumulation_steps() == 1,
            "gradient_clipping": engine.gradient_clipping() == clip,
            "communication_data_type": engine.communication_data_type == torch.float32,
            "bf16": engine.bfloat16_enabled() == (precision == torch.bfloat16),
        }
        assert all(understood.values()), f"DeepSpeed did not take what it was given: {understood}"

    def _correct_stage3_norm(self) -> None:
        """Stage 3 takes the rank within the model for the tensor rank, and does not know tied copies."""
        self.optimizer.model_parallel_rank = self.topology.tensor.rank
        original = self.optimizer.get_grad_norm_direct

        def norm(gradients: list[Tensor], parameters: list[nn.Parameter], norm_type: int = 2) -> Any:
            once = [
                torch.zeros_like(g) if getattr(p, "ds_pipe_replicated", False) else g
                for g, p in zip(gradients, parameters, strict=True)
            ]
            return original(once, parameters, norm_type)

        self.optimizer.get_grad_norm_direct = norm

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        with self._flat_gradients() if self.aliased else self._one_reduction():
            yield
            self._reduce_model_parallel()

    @contextmanager
    def _one_reduction(self) -> Iterator[None]:
        """Gradients stay on the parameters and are reduced once, on leaving."""
        with self.deepspeed.coalesce_grad_reduction():
            yield
            self.optimizer.backward_epilogue()

    @contextmanager
    def _flat_gradients(self) -> Iterator[None]:
        """bf16 ZeRO-1: autograd adds into the optimizer's flat fp32 gradients, which are told that they are full."""
        optimizer = self.optimizer
        for parameters, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.view_as(parameter)
        yield
        for i, parameters in enumerate(optimizer.bf16_groups):
            for j, parameter in enumerate(parameters):
                parameter.grad = None
                parameter._hp_grad = optimizer.fp32_groups_gradients[i][j]
                optimizer.fp32_groups_has_gradients[i][j] = True
        self.deepspeed.allreduce_gradients()

    def scale_loss(self, loss: Tensor) -> Tensor:
        """DeepSpeed averages over data parallel ranks; the contract is a sum."""
        return loss * self.topology.data.size

    def step(self, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.step()
        self.steps_done += 1
        return torch.as_tensor(self.deepspeed.get_global_grad_norm(), dtype=torch.float32)

    def read(self, name: str, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.parameters[name]
        self._link_moments()
        value = (
            safe_get_full_fp32_param(parameter) if kind == WEIGHT else safe_get_full_optimizer_state(parameter, kind)
        )
        return value.float().view(self.shapes[name])

    def write(self, name: str, kind: str, value: Tensor) -> None:
        parameter = self.parameters[name]
        if self.stage == 3:
            self._write_partition(parameter, kind, value)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def _write_partition(self, parameter: Any, kind: str, value: Tensor) -> None:
        """This rank's slice of a padded flat parameter: DeepSpeed's own full setter cuts without the padding."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        length, data = parameter.ds_tensor.numel(), self.topology.data
        padded = F.pad(value.flatten(), (0, length * data.size - value.numel()))
        part = padded.narrow(0, length * data.rank, length)
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, kind)

    def prepare_load(self, steps_done: int) -> None:
        self.steps_done = steps_done
        inner = self.optimizer.optimizer
        for flat in self._flat_masters():
            inner.state[flat] = initial_state(flat, steps_done)
        self._moments_linked = False
        self._link_moments()

    def finish_load(self) -> None:
        if self.stage == 3:
            self.optimizer._partition_all_parameters()
            for i in range(len(self.optimizer.fp16_groups)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(i)
        else:
            self.optimizer.update_lp_params()

    def _flat_masters(self) -> list[Tensor]:
        if self.aliased:
            return self.optimizer.fp32_groups_flat_partition
        return (
            self.optimizer.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.optimizer.single_partition_of_fp32_groups
        )

    def _link_moments(self) -> None:
        """DeepSpeed links moments to parameters after the first group's step only, and the other groups stay unlinked."""
        if self.stage != 3 and self.optimizer.optimizer.state and not self._moments_linked:
            self._moments_linked = True
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
