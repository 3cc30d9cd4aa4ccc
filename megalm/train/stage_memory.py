"""What one pipeline stage needs on one rank: its model states, and what a microbatch's forward and backward keep and reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import astuple, dataclass

from megalm.config.machine import uses_cuda
from megalm.config.run import RunConfig
from megalm.config.train import ITEM_BYTES
from megalm.models.activations import Setting, block_tape, embedding_backward, head_tape
from megalm.models.plans import PLANS
from megalm.models.shapes import stage_shapes
from megalm.models.tape import Profile, Tape
from megalm.parallel.memory import ModelStates, model_states, step_bytes
from megalm.parallel.volume_parts import cut


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one microbatch on one stage."""

    kept: float  # from forward to backward
    waiting: float  # from a backward of inputs to that of weights
    forward: float  # the most within a forward, beside what was there before it
    backward: float  # the same of a backward: above what was kept


def setting_of(config: RunConfig) -> Setting:
    """What decides about a microbatch's activations on one rank."""
    parallel, train = config.parallel, config.train
    element = ITEM_BYTES[train.precision]
    return Setting(
        element,
        tokens=config.local_tokens,
        samples=train.micro_batch_size,
        tensor_parallel=parallel.tensor_parallel,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_parallel > 1,
        fused=config.kernels.fuse_projections and parallel.zero < 3,
        triton=frozenset(name for name in config.kernels.operations() if on_triton(config, name)),
        cuda=uses_cuda(config),
        scores=config.data.seq_length if config.kernels.attention == "reference" else 0,
        gradient_bytes=4 if train.accumulate_fp32 else element,
        experts_here=config.model.num_experts // parallel.expert_parallel,
        context=parallel.context_method if parallel.context_parallel > 1 else "",
        context_parallel=parallel.context_parallel,
    )


def on_triton(config: RunConfig, operation: str) -> bool:
    """Whether an operation will run as a Triton kernel: asked for, or left to a machine that has a GPU."""
    wish = config.kernels.operations()[operation]
    wish = config.kernels.backend if wish == "auto" else wish
    return wish == "triton" or (wish != "torch" and uses_cuda(config))


class BlockMemory:
    """The profiles of a run's blocks, dense or of experts, recomputed or not, each found once."""

    def __init__(self, config: RunConfig, one_loss: bool = True):
        """one_loss: no microbatch's loss waits for its backward while another's is computed."""
        self.config, self.setting, self.one_loss = config, setting_of(config), one_loss
        self.tapes = {e: block_tape(config.model, self.setting, e) for e in {config.model.has_experts(i) for i in _all(config)}}
        self.profiles: dict[tuple[bool, str], Profile] = {}

    def tape(self, layer: int) -> Tape:
        return self.tapes[self.config.model.has_experts(layer)]

    def profile(self, layer: int) -> Profile:
        train = self.config.train
        mode = train.recompute if layer % train.recompute_every == 0 else "none"
        key = self.config.model.has_experts(layer), mode
        if key not in self.profiles:
            self.profiles[key] = self.tape(layer).profile(mode, train.recompute_modules if mode == "modules" else ())
        return self.profiles[key]

    def head(self) -> Tape:
        """Last norm, head and loss."""
        loss = "triton" if on_triton(self.config, "cross_entropy") else "torch"
        if self.config.kernels.fused_loss:
            kept = self.one_loss and self.config.train.precision != "fp16" and self.setting.tensor_parallel == 1
            loss = "fused_kept" if kept else "fused"
        return head_tape(self.config.model, self.setting, loss)

    def stage(self, layers: range, first: bool, last: bool) -> StageMemory:
        """Forward: each block beside what those before it keep. Backward: the same in reverse.

        Offloaded activations are here for two blocks at a time: of the one that runs and of the one before it.
        """
        offload = self.config.train.offload_activations != "none"
        blocks = [self.profile(i) for i in layers]
        waiting = sum(self.tape(i).waiting() for i in layers)
        kept = forward = 0.0
        backward = embedding_backward(self.config.model, self.setting) if first else 0.0
        large = 0.0  # of the block before, if it would be away later
        for block in blocks:
            forward, backward = max(forward, kept + large + block.forward), max(backward, kept + large + block.backward)
            kept += block.small if offload else block.kept
            large = block.kept - block.small if offload else 0.0
        if last:
            head = self.head()
            profile, waiting = head.profile(), waiting + head.waiting()
            forward = max(forward, kept + 2 * large + profile.forward)
            backward = max(backward, kept + 2 * large + profile.backward)
            kept += profile.kept
        return StageMemory(kept, waiting, max(forward, kept), max(backward - kept, 0.0))


def _all(config: RunConfig) -> range:
    return range(config.model.num_layers)


@dataclass(frozen=True)
class Held:
    """What a rank holds of weights: model states, and what the end of a step takes besides."""

    states: ModelStates
    step: int


def held_by(config: RunConfig, layers: Iterable[range], stages: Collection[int], num_stages: int) -> Held:
    """Of a rank with these stages; of experts those that are dealt out to it, shared out over fewer copies."""
    elements = Counter[bool]()
    for stage, inside in zip(stages, layers, strict=True):
        shapes = stage_shapes(config.model, inside, stage == 0, stage == num_stages - 1)
        if config.model.tie_embeddings and stage == num_stages - 1 > 0 and 0 in stages:
            del shapes["head.weight"]  # the embedding's, which is here too
        for part in cut(shapes, PLANS[config.model.architecture], config):
            elements[part.dealt_out] += part.numel
    dense = _held(config, elements[False], config.replicas)
    if not elements[True]:
        return dense
    experts = _held(config, elements[True], config.replicas // config.parallel.expert_parallel)
    states = zip(astuple(dense.states), astuple(experts.states), strict=True)
    return Held(ModelStates(*(a + b for a, b in states)), max(dense.step, experts.step))


def _held(config: RunConfig, parameters: int, copies: int) -> Held:
    parallel, train = config.parallel, config.train
    in_backward = parallel.zero > 0 and parallel.zero_reduce == "microbatch"
    about = (parameters, copies, parallel.zero, train.precision, in_backward, train.accumulate_fp32)
    offload = parallel.zero > 0 and parallel.zero_offload != "none"
    return Held(model_states(*about, offload=offload), step_bytes(*about))
