"""How the model is laid over the processes, and the short names of layouts (`tp2_pp2_dp2_zero3`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megalm.config.knobs import knob

SCHEDULES = ("gpipe", "1f1b", "interleaved")
CHUNKED = ("gpipe", "interleaved")  # what runs more than one chunk per rank


@dataclass
class ParallelConfig:
    """How many ranks share one model. Data parallel is what remains: processes / (tensor x pipeline)."""

    tensor_parallel: int = knob(1, "ranks that split every layer's matrices", minimum=1)
    sequence_parallel: bool = knob(
        False, "split norms and dropout along the sequence over the tensor parallel ranks: less activation memory"
    )
    pipeline_parallel: int = knob(1, "stages, each with a run of layers", minimum=1)
    chunks: int = knob(
        1, "model chunks per pipeline rank; more than 1: schedule=interleaved, or gpipe (breadth-first)", minimum=1
    )
    schedule: str = knob(
        "1f1b", "order of forwards and backwards in the pipeline; interleaved: 1f1b over chunks", allowed=SCHEDULES
    )
    zero: int = knob(
        0,
        "shared out over the copies. 0: nothing (own engine); DeepSpeed 1: optimizer, 2: + reduced gradients, 3: + weights",
        allowed=(0, 1, 2, 3),
    )

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_parallel * self.pipeline_parallel


_PART = re.compile(r"(tp|pp|dp|chunks|zero)(\d+)|(sp)|(gpipe|1f1b|interleaved)")
_FIELD = {"tp": "tensor_parallel", "pp": "pipeline_parallel", "chunks": "chunks", "zero": "zero"}


def parse_layout(name: str) -> tuple[dict[str, object], int]:
    """`tp2_sp_pp2_gpipe_dp2_zero3` -> ({fields of ParallelConfig}, data parallel size). `interleaved` alone has 2 chunks.

    Raises ValueError with the part it cannot read.
    """
    values: dict[str, object] = {}
    data_parallel = 1
    for part in [] if name in ("single", "") else name.split("_"):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(
                f"cannot read {part!r} in layout {name!r}; parts are tpN, sp, ppN, chunksN, gpipe, 1f1b, interleaved, dpN, zeroN"
            )
        if match[1] == "dp":
            data_parallel = int(match[2])
        elif match[1]:
            values[_FIELD[match[1]]] = int(match[2])
        elif match[3]:
            values["sequence_parallel"] = True
        else:
            values["schedule"] = match[4]
    if values.get("schedule") == "interleaved":
        values.setdefault("chunks", 2)
    return values, data_parallel


def layout_name(parallel: ParallelConfig, data_parallel: int) -> str:
    """The short name of a layout; what is 1 or the default is left out, and the one-rank layout is called `single`."""
    parts = [f"tp{parallel.tensor_parallel}"] if parallel.tensor_parallel > 1 else []
    parts += ["sp"] if parallel.sequence_parallel and parallel.tensor_parallel > 1 else []
    if parallel.pipeline_parallel > 1:
        parts.append(f"pp{parallel.pipeline_parallel}")
        parts += [parallel.schedule] if parallel.schedule != "1f1b" else []
        usual = 2 if parallel.schedule == "interleaved" else 1
        parts += [f"chunks{parallel.chunks}"] if parallel.chunks != usual else []
    parts += [f"dp{data_parallel}"] if data_parallel > 1 else []
    parts += [f"zero{parallel.zero}"] if parallel.zero else []
    return "_".join(parts) or "single"
