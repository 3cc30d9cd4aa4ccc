"""The start of a ZeRO-3 model larger than one rank's memory: each parameter is shared out before the next one is made.

DeepSpeed's own way (`zero.Init` as a context) rewrites every module's constructor in the process; only its converter is used
here, on one parameter at a time. All ranks of a data parallel group make the same parameters in the same order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from megalm.config.parallel import ParallelConfig
from megalm.parallel.topology import Topology
from megalm.parallel.zero_config import import_deepspeed, make_node_groups


class ShareOut:
    """Call it with a parameter: this rank keeps its part, and `parameter.ds_shape` says what it was. Collective."""

    def __init__(self, topology: Topology, dtype: torch.dtype, parallel: ParallelConfig):
        self.converter = None
        if topology.data.handle is None:
            return  # one copy: nothing to share out
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        self.converter = deepspeed.zero.Init(
            # Without it the whole world would share a stage's weights, and with pipeline stages the run dies.
            data_parallel_group=topology.data.handle,
            mem_efficient_linear=False,
            dtype=dtype,
            zero_param_parallel_group=make_node_groups(topology, parallel.zero_node_size),
            zero_quantized_weights=parallel.zero_quantized,
        )

    def __call__(self, parameter: nn.Parameter) -> None:
        if self.converter is not None:
            self.converter._convert_to_zero_parameters([parameter])
