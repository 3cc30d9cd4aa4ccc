"""megatron-core's side of `tools/bench_parallel.py`: one rank of a GPT or LLaMA in training on a CPU.

Runs in an environment that has megatron-core and torch, and not megalm. megatron-core means to run on GPUs; what it asks of
CUDA beside a training step is answered here: the device is the CPU, there is nothing to synchronise, and the random state of
dropout (which is off) is not kept apart. Its fused kernels and its own optimizer need CUDA, so AdamW and the clipping are
torch's, in their fast forms (fused, foreach). Attention is torch's scaled_dot_product_attention, or its own (`local`).
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_turns import clocked, join_group, serve

warnings.filterwarnings("ignore")


def answer_for_cuda() -> None:
    """What megatron-core asks of CUDA on the way through a step; call before it is used."""
    from megatron.core.tensor_parallel import random

    make_zeros = torch.zeros

    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return make_zeros(*size, device="cpu" if device == "cuda" else device, **options)

    torch.zeros = zeros
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *ignored: None
    random.CudaRNGStatesTracker.fork = lambda *ignored: contextlib.nullcontext()


class FlashAttention(torch.nn.Module):
    """Stands in for megatron-core's local attention. q, k, v (S, B, H, D) -> (S, B, H * D), causal."""

    def __init__(self, **ignored: Any):
        super().__init__()

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **ignored: Any) -> torch.Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).flatten(2)


def build_config(spec: dict[str, Any]) -> Any:
    """The transformer as the specification says; every fusion that needs CUDA is off."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    gpt = spec["architecture"] == "gpt"
    return TransformerConfig(
        num_layers=spec["layers"], hidden_size=spec["hidden"], num_attention_heads=spec["heads"], ffn_hidden_size=spec["ffn"],
        normalization="LayerNorm" if gpt else "RMSNorm", gated_linear_unit=not gpt, add_bias_linear=gpt,
        activation_func=functools.partial(F.gelu, approximate="tanh") if gpt else F.silu,
        hidden_dropout=0.0, attention_dropout=0.0, layernorm_epsilon=1e-5,
        tensor_model_parallel_size=spec["tensor"], pipeline_model_parallel_size=spec["pipeline"],
        use_cpu_initialization=True, pipeline_dtype=torch.float32, batch_p2p_comm=False, deallocate_pipeline_outputs=False,
        gradient_accumulation_fusion=False, bias_dropout_fusion=False, bias_activation_fusion=False,
        masked_softmax_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip


def build_model(spec: dict[str, Any], config: Any) -> torch.nn.Module:
    """This rank's part; with several copies inside megatron-core's own data parallel wrapper."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    gpt = spec["architecture"] == "gpt"
    layer = get_gpt_layer_local_spec(normalization=config.normalization)
    if spec["attention"] == "sdpa":
        layer.submodules.self_attention.submodules.core_attention = FlashAttention
    model = GPTModel(
        config=config, transformer_layer_spec=layer, vocab_size=spec["vocab"], max_sequence_length=spec["seq"],
        position_embedding_type="learned_absolute" if gpt else "rope", share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
    )  # fmt: skip
    if spec["data"] == 1:
        return model
    config.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(config=config, ddp_config=DistributedDataParallelConfig(), module=model)


def make_batches(spec: dict[str, Any], copy: int) -> Iterator[torch.Tensor]:
    """Microbatches of random tokens without end, (B, S + 1)."""
    generator = torch.Generator().manual_seed(1000 + copy)
    while True:
        yield torch.randint(spec["vocab"], (spec["micro_batch"], spec["seq"] + 1), generator=generator)


class Optimizer:
    """AdamW with clipping by the norm over all ranks of a copy of the model."""

    def __init__(self, model: torch.nn.Module, spec: dict[str, Any]):
        from megatron.core import parallel_state

        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        self.parameters = parameters
        self.counted = [p for p in parameters if first or getattr(p, "tensor_model_parallel", False)]
        self.model, self.buffered = model, spec["data"] > 1
        self.group = parallel_state.get_model_parallel_group() if spec["tensor"] * spec["pipeline"] > 1 else None

    def zero(self) -> None:
        """Forget the last step's gradients."""
        if self.buffered:
            self.model.zero_grad_buffer()  # type: ignore[operator]
        self.adamw.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Clip and update; returns the norm."""
        if self.buffered:
            for parameter in self.parameters:
                parameter.grad = parameter.main_grad  # type: ignore[attr-defined]
        square = torch.nn.utils.get_total_norm([p.grad for p in self.counted if p.grad is not None]) ** 2
        if self.group is not None:
            dist.all_reduce(square, group=self.group)
        norm = square.sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.parameters, 1.0, norm)
        self.adamw.step()
        return norm


def build(spec: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    """What runs steps: forwards and backwards by megatron-core's schedule, clip, update."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    answer_for_cuda()
    join_group()
    parallel_state.initialize_model_parallel(spec["tensor"], spec["pipeline"])
    torch.manual_seed(1)
    model = build_model(spec, build_config(spec))
    optimizer, run_schedule = Optimizer(model, spec), get_forward_backward_func()
    seq = spec["seq"]
    own_attention = spec["attention"] == "local"
    mask = torch.ones(1, 1, seq, seq, dtype=torch.bool).triu(1) if own_attention else None
    positions = torch.arange(seq)[None].expand(spec["micro_batch"], -1)
    batches = make_batches(spec, parallel_state.get_data_parallel_rank())
    microbatches = spec["global_batch"] // (spec["micro_batch"] * spec["data"])

    def forward(data: Iterator[torch.Tensor], part: torch.nn.Module) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        rows = next(data)
        output = part(rows[:, :-1].contiguous(), positions, mask, labels=rows[:, 1:].contiguous())
        return output, mean_loss

    def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mean = losses.mean()
        return mean, {"loss": mean.detach().clone()}  # the schedule divides the mean in place

    def step() -> torch.Tensor | None:
        optimizer.zero()
        parts = run_schedule(
            forward_step_func=forward, data_iterator=batches, model=[model], num_microbatches=microbatches, seq_length=seq,
            micro_batch_size=spec["micro_batch"], forward_only=False,
        )  # fmt: skip
        optimizer.step()
        if not parts:  # not the last stage
            return None
        loss = torch.stack([part["loss"] for part in parts]).mean()
        if spec["data"] > 1:
            dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
        return loss / spec["data"]

    return clocked(step)


if __name__ == "__main__":
    sys.exit(serve(build))
