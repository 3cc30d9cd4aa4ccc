"""The start of a ZeRO-3 model larger than one rank's memory: each parameter is shared out before the next one is made.

DeepSpeed's own way (`zero.Init` as a context) rewrites every module's constructor in the process; only its converter is used
here, on one parameter at a time. All ranks of a data parallel group make the same parameters in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megalm.config.parallel import ParallelConfig
from megalm.parallel.tensor_parallel import shard_of
from megalm.parallel.topology import Group, Topology
from megalm.parallel.zero_config import import_deepspeed, make_node_groups


class ShareOut:
    """Call it with a parameter: this rank keeps its part, and `parameter.ds_shape` says what it was. Collective.

    Experts that are dealt out are shared by the ranks that have the same ones; a group of one has nothing to share out.
    """

    def __init__(self, topology: Topology, dtype: torch.dtype, parallel: ParallelConfig):
        self.topology, self.dtype, self.quantized = topology, dtype, parallel.zero_quantized
        self.node_size = parallel.zero_node_size
        self.converter = self._converter(topology.data)
        self.expert_converter = self._converter(topology.expert_data) if topology.expert.size > 1 else None

    def _converter(self, group: Group) -> Any:
        if group.handle is None:
            return None
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        return deepspeed.zero.Init(
            # Without it the whole world would share a stage's weights, and with pipeline stages the run dies.
            data_parallel_group=group.handle,
            mem_efficient_linear=False,
            dtype=self.dtype,
            zero_param_parallel_group=make_node_groups(self.topology, self.node_size),
            zero_quantized_weights=self.quantized,
        )

    def __call__(self, parameter: nn.Parameter) -> None:
        converter = self.expert_converter if shard_of(parameter).is_dealt_out else self.converter
        if converter is not None:
            converter._convert_to_zero_parameters([parameter])
