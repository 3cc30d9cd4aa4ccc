"""How the model is laid over the processes, and the short names of layouts (`tp2_pp2_dp2_zero3`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megalm.config.knobs import knob

SCHEDULES = ("gpipe", "1f1b", "interleaved", "bfs", "zbh1", "zbv", "dualpipev", "csv")
CHUNKED = ("gpipe", "interleaved", "bfs", "zbv", "dualpipev", "csv")  # what may run more than one chunk per rank
CONTEXT_METHODS = ("ring", "ulysses")
TWO_CHUNKS = ("zbv", "dualpipev")  # the model goes down the ranks and back up: always two chunks per rank
SPLIT_BACKWARD = ("zbh1", "zbv", "dualpipev")  # input gradients first, weight gradients where a rank would wait


@dataclass
class ParallelConfig:
    """How many ranks share one model. Data parallel is what remains: processes / (tensor x context x pipeline)."""

    tensor_parallel: int = knob(1, "ranks that split every layer's matrices", minimum=1)
    sequence_parallel: bool = knob(
        False, "split norms and dropout along the sequence over the tensor parallel ranks: less activation memory"
    )
    context_parallel: int = knob(1, "ranks that share the tokens of one sample, for long sequences", minimum=1)
    context_method: str = knob(
        "ring",
        "how attention sees the other ranks' tokens. ring: keys and values go round; ulysses: all-to-all, a rank has some heads",
        allowed=CONTEXT_METHODS,
    )
    expert_parallel: int = knob(1, "ranks, of the data x context ones, that the experts are dealt out to", minimum=1)
    pipeline_parallel: int = knob(1, "stages, each with a run of layers", minimum=1)
    chunks: int = knob(1, "model chunks per pipeline rank; more than 1 needs a schedule with chunks", minimum=1)
    schedule: str = knob(
        "1f1b",
        "order of forwards and backwards in the pipeline. With chunks: interleaved (1f1b), bfs (breadth first); zero bubble: "
        "zbh1, zbv, dualpipev; csv: your own",
        allowed=SCHEDULES,
    )
    schedule_file: str = knob("", "schedule=csv: one line per rank, cells like 0F3 (stage, F B I or W, microbatch)")
    stage_split: str = knob(
        "even",
        "layers per stage. even; auto: balanced by FLOPs and memory, with embedding and loss; or numbers: 3,5,5,3",
        empty=False,
    )
    zero: int = knob(
        0,
        "shared out over the copies. 0: nothing (own engine); DeepSpeed 1: optimizer, 2: + reduced gradients, 3: + weights",
        allowed=(0, 1, 2, 3),
    )
    zero_reduce: str = knob(
        "step",
        "when ZeRO reduces gradients. step: once, whole until then; microbatch: in the backward, which is the memory of 2 and 3",
        allowed=("step", "microbatch"),
    )
    zero_offload: str = knob("none", "where the optimizer's state lives", allowed=("none", "cpu", "nvme"))
    zero_offload_path: str = knob("", "zero_offload=nvme: a folder on the disk")
    zero_node_size: int = knob(
        0, "zero=3: ranks that keep a second copy of the weights among them, one node (hpZ); 0: none", minimum=0
    )
    zero_quantized: bool = knob(False, "zero=3 on GPUs: weights travel in 8 bits, gradients in 4 (ZeRO++)")
    overlap: bool = knob(
        True, "tensor parallel: gradients of activations are summed while gradients of weights are computed"
    )

    @property
    def model_parallel(self) -> int:
        """Ranks that hold the weights once."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def ranks_per_sample(self) -> int:
        """Ranks that work on one sample; those that hold the weights once, context parallel times over."""
        return self.model_parallel * self.context_parallel


_PART = re.compile(rf"(tp|pp|cp|ep|dp|chunks|zero)(\d+)|(sp)|({'|'.join(SCHEDULES)})|(microbatch)|({'|'.join(CONTEXT_METHODS)})")
USUALLY_TWO = ("interleaved", "bfs", *TWO_CHUNKS)
_FIELD = {
    "tp": "tensor_parallel", "pp": "pipeline_parallel", "cp": "context_parallel", "ep": "expert_parallel", "chunks": "chunks",
    "zero": "zero",
}  # fmt: skip


def parse_layout(name: str) -> tuple[dict[str, object], int]:
    """`tp2_sp_cp2_ring_pp2_gpipe_dp2_ep2_zero3` -> ({fields of ParallelConfig}, data parallel size).

    `interleaved`, `bfs`, `zbv` and `dualpipev` alone have 2 chunks; `microbatch` is zero_reduce=microbatch.

    Raises ValueError with the part it cannot read.
    """
    values: dict[str, object] = {}
    data_parallel = 1
    for part in [] if name in ("single", "") else name.split("_"):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(
                f"cannot read {part!r} in layout {name!r}; parts are tpN, sp, cpN, ppN, chunksN, dpN, epN, zeroN, microbatch, "
                + ", ".join((*CONTEXT_METHODS, *SCHEDULES))
            )
        if match[1] == "dp":
            data_parallel = int(match[2])
        elif match[1]:
            values[_FIELD[match[1]]] = int(match[2])
        elif match[3]:
            values["sequence_parallel"] = True
        elif match[4]:
            values["schedule"] = match[4]
        elif match[5]:
            values["zero_reduce"] = match[5]
        else:
            values["context_method"] = match[6]
    if values.get("schedule") in USUALLY_TWO:
        values.setdefault("chunks", 2)
    return values, data_parallel


def layout_name(parallel: ParallelConfig, data_parallel: int) -> str:
    """The short name of a layout; what is 1 or the default is left out, and the one-rank layout is called `single`."""
    parts = [f"tp{parallel.tensor_parallel}"] if parallel.tensor_parallel > 1 else []
    parts += ["sp"] if parallel.sequence_parallel and parallel.tensor_parallel > 1 else []
    parts += [f"cp{parallel.context_parallel}", parallel.context_method] if parallel.context_parallel > 1 else []
    if parallel.pipeline_parallel > 1:
        parts.append(f"pp{parallel.pipeline_parallel}")
        parts += [parallel.schedule] if parallel.schedule != "1f1b" else []
        usual = 2 if parallel.schedule in USUALLY_TWO else 1
        parts += [f"chunks{parallel.chunks}"] if parallel.chunks != usual else []
    parts += [f"dp{data_parallel}"] if data_parallel > 1 else []
    parts += [f"ep{parallel.expert_parallel}"] if parallel.expert_parallel > 1 else []
    parts += [f"zero{parallel.zero}"] if parallel.zero else []
    parts += ["microbatch"] if parallel.zero and parallel.zero_reduce == "microbatch" else []
    return "_".join(parts) or "single"
