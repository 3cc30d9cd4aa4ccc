"""DeepSpeed's ZeRO stages 1 to 3 behind the Engine interface; only the files `zero*.py` know DeepSpeed.

DeepSpeed partitions, reduces, clips and steps; it does not run the model. The pipeline executor calls the chunks
directly, so `.grad` fills up on plain parameters, and one reduction flushes them. The usual way (`engine(x)`,
`engine.backward`) is wrong here in ways that mostly do not raise:

- with accumulation steps > 1 its output hooks divide the gradient once more at every pipeline stage, so the accumulation
  in its config is 1 and the loss is scaled by us;
- under ZeRO-3 its root forward broadcasts over the whole world and hangs with pipeline stages, so the root is never run;
- reduction in the backward under ZeRO-3 adds into the last step's shard for a chunk whose backward is not the step's first
  (see zero_reduce.py);
- bf16 gradients are accumulated and sent in bf16 unless `.grad` itself is fp32 (`grad_dtype`) and the communication type too;
- ZeRO-3's norm takes the rank in the whole model where the tensor rank is meant, and counts tied copies twice.

tests/parallel/test_zero_traps.py and test_zero_group_traps.py watch each of these facts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.config.parallel import ParallelConfig
from megalm.parallel.engine import WEIGHT, Engine, MakeOptimizer, ParameterGroup, Tie, initial_state
from megalm.parallel.loss_scale import LossScale
from megalm.parallel.tensor_parallel import shard_of
from megalm.parallel.topology import Topology
from megalm.parallel.zero_config import ModelParallelUnit, deepspeed_config, import_deepspeed, make_node_groups, prepare_nvme
from megalm.parallel.zero_reduce import FlatGradients, InBackward, OncePerStep, Reduction, complete_partial_gradients


class ZeroEngine(Engine):
    """ZeRO-1 (optimizer state), 2 (+ gradients) or 3 (+ weights) over the data parallel group.

    `loss_factor`: what a loss without a loss scale is multiplied by, where that is not the group's size (zero_experts.py).
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[ParameterGroup],
        make_optimizer: MakeOptimizer,
        topology: Topology,
        clip: float,
        parallel: ParallelConfig,
        tie: Tie | None = None,
        loss_scale: LossScale | None = None,
        accumulate_fp32: bool = True,
        loss_factor: int = 0,
    ):
        super().__init__(groups, topology, tie, loss_scale)
        self.stage, self._moments_linked, self.loss_factor = parallel.zero, False, loss_factor or topology.data.size
        precision = next(iter(self.parameters.values())).dtype
        if precision != torch.float32 and accumulate_fp32:
            for parameter in self.parameters.values():
                parameter.grad_dtype = torch.float32
        for name, parameter in self.parameters.items():
            parameter.tensor_model_parallel = shard_of(parameter).dim is not None  # type: ignore[attr-defined]
            parameter.ds_pipe_replicated = self.is_extra_copy(name)  # type: ignore[attr-defined]
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        make_node_groups(topology, parallel.zero_node_size)
        if parallel.zero_offload == "nvme":
            prepare_nvme(parallel.zero_offload_path)
        optimizer = make_optimizer(
            [{"params": list(g.parameters.values()), "weight_decay": g.weight_decay} for g in groups]
        )
        elements = sum(math.prod(shape) for shape in self.shapes.values())
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(parallel, precision, clip, accumulate_fp32, elements, topology.device.type),
            mpu=ModelParallelUnit(topology),
        )
        self._check_understood(precision, clip)
        if self.stage == 2 and precision != torch.float32 and accumulate_fp32:
            self.optimizer.use_grad_accum_attribute = True  # else gradients pass through a bucket of low precision
        self.releasing: list[Any] = []
        if self.stage == 3:
            self._correct_stage3_norm()
            self.releasing = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
        self.aliased = type(self.optimizer).__name__ == "BF16_Optimizer"  # bf16 ZeRO-1: flat fp32 gradients of its own
        self.reduction: Reduction = FlatGradients(self.excess) if self.aliased else OncePerStep()
        if parallel.zero_reduce == "microbatch":
            assert self.stage > 1 and tie is None, "validated"
            self.reduction = InBackward(self.optimizer, self.stage)
            complete_partial_gradients(list(self.parameters.values()), topology.tensor)
        self.tell_scale()

    def _check_understood(self, precision: torch.dtype, clip: float) -> None:
        """DeepSpeed takes defaults for keys it does not know, without a word: compare what it says with what was meant."""
        engine = self.deepspeed
        understood = {
            "stage": engine.zero_optimization_stage() == self.stage,
            "gradient_accumulation_steps": engine.gradient_accumulation_steps() == 1,
            "gradient_clipping": engine.gradient_clipping() == clip,
            "communication_data_type": engine.communication_data_type == torch.float32,
            "bf16": engine.bfloat16_enabled() == (precision == torch.bfloat16),
            "fp16": engine.fp16_enabled() == (precision == torch.float16),
        }
        assert all(understood.values()), f"DeepSpeed did not take what it was given: {understood}"

    def _correct_stage3_norm(self) -> None:
        """Stage 3 takes the rank within the model for the tensor rank, and does not know tied copies.

        Where it is told of no model parallel group (zero_experts.py) it would count what tensor ranks have copies of on each.
        """
        self.optimizer.model_parallel_rank = self.topology.tensor.rank
        self.optimizer._grad_norm_counts_every_rank = lambda parameters, group: False
        original = self.optimizer.get_grad_norm_direct

        def norm(gradients: list[Tensor], parameters: list[nn.Parameter], norm_type: int = 2) -> Any:
            once = [
                torch.zeros_like(g) if getattr(p, "ds_pipe_replicated", False) else g
                for g, p in zip(gradients, parameters, strict=True)
            ]
            return original(once, parameters, norm_type)

        self.optimizer.get_grad_norm_direct = norm
        offloaded = self.optimizer.complete_grad_norm_calculation_for_cpu_offload

        def norm_of_offloaded(parameters: list[Any]) -> Any:
            for parameter in parameters:
                if getattr(parameter, "ds_pipe_replicated", False):
                    self.optimizer.norm_for_param_grads[self.optimizer.get_param_id(parameter)] = 0.0
            return offloaded(parameters)

        self.optimizer.complete_grad_norm_calculation_for_cpu_offload = norm_of_offloaded

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        with self.reduction.scope(self.deepspeed):
            yield
            if not self.reduction.in_backward:
                self._reduce_model_parallel()

    def before_backward(self) -> None:
        """ZeRO-3 releases a module's weights when its backward ends, which it tells by a counter that each forward sets to one:
        of several backwards in a row the first alone would release, and the others leave a whole stage gathered."""
        for module in self.releasing:
            module.ds_grads_remaining = 1

    def after_backward(self) -> None:
        self.reduction.after_backward(self.deepspeed)
        if self.stage == 3:  # an embedding's end is not noticed: no gradient goes to token numbers
            self.optimizer.parameter_offload.release_backward_leftovers()

    def scale_loss(self, loss: Tensor) -> Tensor:
        """DeepSpeed averages over data parallel ranks; the contract is a sum. In fp16 see `tell_scale`."""
        return loss * (self.loss_factor if self.loss_scale is None else self.loss_scale.scale)

    def step(self, lr: float) -> Tensor:
        """DeepSpeed divides by the loss scale and finds the overflow; whether the scale changes is our LossScale's business."""
        norm = self.update(lr)
        if self.loss_scale is not None:
            self.loss_scale.update(self.skipped)
            self.tell_scale()
        return norm

    def update(self, lr: float) -> Tensor:
        """A step without a word about the loss scale."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.step()
        self.skipped = bool(self.optimizer.overflow)
        self.steps_done += not self.skipped
        if self.skipped and self.stage < 3 and not self.aliased:  # offload keeps it: every later step overflows
            self.optimizer.averaged_gradients = dict.fromkeys(self.optimizer.averaged_gradients)
        return torch.as_tensor(self.deepspeed.get_global_grad_norm(), dtype=torch.float32)

    @property
    def excess(self) -> float:
        """How many times too large gradients are once DeepSpeed has averaged them: it is to divide them by that.

        In fp16 that is the scale, but not again by the copies, over which it averages: the loss itself must not grow with the
        copies, which would overflow where one rank does not.
        """
        return (self.loss_factor if self.loss_scale is None else self.loss_scale.scale) / self.topology.data.size

    def tell_scale(self) -> None:
        """`excess` may have changed; FlatGradients divides by it itself."""
        if (self.loss_scale is not None or self.excess != 1.0) and not self.aliased:
            self.optimizer.override_loss_scale(self.excess)

    def gradient(self, name: str) -> Tensor:
        parameter: Any = self.parameters[name]
        whole = self.optimizer.get_fp32_grad_for_param(parameter) if self.stage == 3 else parameter.get_full_hp_grad()
        return whole.float().view(self.shapes[name]) / (1.0 if self.aliased else self.excess)

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
        for i, flat in enumerate(self._flat_masters()):
            with self._in_memory(i):
                inner.state[flat] = initial_state(flat, steps_done)
        self._moments_linked = False
        self._link_moments()

    def finish_load(self) -> None:
        self.tell_scale()
        if self.stage == 3:
            self.optimizer._partition_all_parameters()
            for i in range(len(self.optimizer.fp16_groups)):
                with self._in_memory(i):
                    self.optimizer._reassign_or_swap_out_partitioned_parameters(i)
        else:
            self.optimizer.update_lp_params()

    @contextmanager
    def _in_memory(self, group: int) -> Iterator[None]:
        """Master weights and moments of one group; they may be on a disk (nvme)."""
        swapped = self.stage == 3 and self.optimizer._swappable_optimizer_subgroup(group)
        if swapped:
            self.optimizer._optimizer_states_and_gradient_swap_in(group)
        yield
        if swapped:
            self.optimizer._optimizer_states_and_gradient_swap_out(group)

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
