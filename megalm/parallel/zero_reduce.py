"""When ZeRO reduces gradients over the copies: once per step, or behind each backward.

Once per step, gradients stay whole on the parameters until the end (`OncePerStep`, and `FlatGradients` for DeepSpeed's own
bf16 optimizer). Behind each backward (`InBackward`), DeepSpeed's hooks put each gradient into a bucket the moment it is
complete, a full bucket is reduced, and of the sum a rank keeps its share alone: the gradient memory of ZeRO-2 and 3.

DeepSpeed does the latter when its own engine runs the model; here the pipeline executor does, so the two things that its
engine does around a backward are done by hand: flushing the last bucket, and saying that the next backward adds up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from megalm.parallel.tensor_parallel import shard_of, sum_partial_gradients
from megalm.parallel.topology import Group


class Reduction(Protocol):
    """One way to reduce gradients. `deepspeed` is its engine."""

    in_backward: bool  # then gradients are gone from the parameters when the scope ends

    def scope(self, deepspeed: Any) -> Any:
        """Context manager around a step's backwards; what it leaves is reduced."""

    def after_backward(self, deepspeed: Any) -> None:
        """Behind each backward."""


class OncePerStep:
    """Gradients stay on the parameters and are reduced once, on leaving."""

    in_backward = False

    @contextmanager
    def scope(self, deepspeed: Any) -> Iterator[None]:
        with deepspeed.coalesce_grad_reduction():
            yield
            deepspeed.optimizer.backward_epilogue()

    def after_backward(self, deepspeed: Any) -> None:
        pass


class FlatGradients:
    """bf16 ZeRO-1: autograd adds into the optimizer's flat fp32 gradients, which are told that they are full."""

    in_backward = False

    def __init__(self, excess: float = 1.0):
        self.excess = excess  # what gradients are divided by: this optimizer of DeepSpeed's knows no loss scale

    @contextmanager
    def scope(self, deepspeed: Any) -> Iterator[None]:
        optimizer = deepspeed.optimizer
        for parameters, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.view_as(parameter)
        yield
        for i, parameters in enumerate(optimizer.bf16_groups):
            for j, parameter in enumerate(parameters):
                parameter.grad = None
                parameter._hp_grad = optimizer.fp32_groups_gradients[i][j]
                optimizer.fp32_groups_has_gradients[i][j] = True
            if self.excess != 1.0:
                optimizer.fp32_groups_gradients_flat[i].div_(self.excess)
        from deepspeed.utils import groups

        groups.mpu = deepspeed.mpu  # DeepSpeed asks the engine that was made last over which ranks to reduce
        deepspeed.allreduce_gradients()

    def after_backward(self, deepspeed: Any) -> None:
        pass


class InBackward:
    """ZeRO-2 and 3: gradients are reduced while the backward runs."""

    in_backward = True

    def __init__(self, optimizer: Any, stage: int):
        self.stage = stage
        if stage == 2:
            # A rank's share adds up in one flat buffer. DeepSpeed does so where gradients have more bits than weights; else
            # it keeps every parameter that touches the share whole, and beside the sum the last microbatch's.
            optimizer.use_grad_accum_attribute = True
            optimizer._use_compact_grad_partition_buffer = lambda group: True

    @contextmanager
    def scope(self, deepspeed: Any) -> Iterator[None]:
        optimizer = deepspeed.optimizer
        optimizer.set_gradient_accumulation_boundary(False)
        if self.stage == 3:
            # DeepSpeed's first backward of a step overwrites, the others add; but with several chunks a parameter's first
            # backward need not be the step's, and it would add to the last step's gradient. So: always add, to zero.
            optimizer.grad_partitions_flat_buffer.zero_()
            optimizer.micro_step_id = 1
        yield
        optimizer.finalize_gradient_accumulation_boundary()

    def after_backward(self, deepspeed: Any) -> None:
        optimizer = deepspeed.optimizer
        if self.stage == 2 and not any(bucket.buffer for bucket in optimizer.ipg_buckets.values()):
            return  # no gradient of its parameters: a stage without experts. DeepSpeed would look into a bucket that is not there
        optimizer.overlapping_partition_gradients_reduce_epilogue()
        optimizer.clear_backward_seen_flag()


def complete_partial_gradients(parameters: list[nn.Parameter], group: Group) -> None:
    """Gradients that arise in parts over the tensor group are summed before anyone else sees them, in a hook each."""
    for parameter in parameters:
        if group.size > 1 and shard_of(parameter).is_partial:

            def hook(gradient: Tensor, parameter: nn.Parameter = parameter) -> Tensor:
                whole = gradient.clone()  # autograd's own may be shared
                sum_partial_gradients([parameter], [whole], group)
                return whole

            parameter.register_hook(hook)
