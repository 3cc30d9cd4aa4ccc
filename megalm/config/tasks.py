"""The configurations of the verbs that are not a training run."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.data import PrepareConfig
from megalm.config.kernels import KERNELS, KernelsConfig
from megalm.config.knobs import knob, section
from megalm.config.parallel import USUALLY_TWO, ParallelConfig

BENCHMARKS = (*KERNELS, "attention_packed")
PEERS = (  # in benchmarks
    "torch", "apex", "torch.compile", "torch fused", "torch foreach", "torch chunked", "foreach", "liger", "deepspeed",
    "torch grouped_mm",
    "triton unordered", "triton plain", "sdpa flash", "sdpa cudnn", "sdpa efficient", "flex", "flash-attn 2", "flash-attn 3",
)  # fmt: skip


@dataclass
class PrepareRun:
    """Root of `megalm prepare`."""

    prepare: PrepareConfig = section(PrepareConfig)


@dataclass
class GenerateConfig:
    """Continue a prompt with a trained model, on one process."""

    checkpoint: str = knob("runs/pretrain", "checkpoint folder, or a run folder (its latest)")
    tokenizer: str = knob("", "tokenizer.json; empty: the one the run was trained with")
    prompt: str = knob("def ", "text to continue", empty=False)
    max_tokens: int = knob(128, "tokens to add", minimum=1)
    samples: int = knob(1, "continuations to draw", minimum=1)
    greedy: bool = knob(False, "always the likeliest token; temperature, top_k and top_p have no effect then")
    temperature: float = knob(0.8, "flattens (above 1) or sharpens (below 1) the distribution", above=0.0)
    top_k: int = knob(0, "draw from the k likeliest tokens only; 0: all", minimum=0)
    top_p: float = knob(
        0.95, "draw from the likeliest tokens that together have this probability", above=0.0, maximum=1.0
    )
    seed: int = knob(0, "of the draws", minimum=0)
    device: str = knob("auto", "auto: cuda where there is a GPU, else cpu", allowed=("auto", "cpu", "cuda"))


@dataclass
class GenerateRun:
    """Root of `megalm generate`."""

    generate: GenerateConfig = section(GenerateConfig)


@dataclass
class DoctorConfig:
    """Look at this machine and say what is missing."""

    output: str = knob("text", "how to print", allowed=("text", "json"))


@dataclass
class DoctorRun:
    """Root of `megalm doctor`."""

    doctor: DoctorConfig = section(DoctorConfig)


@dataclass
class StatusConfig:
    """How a run is doing."""

    run_dir: str = knob("runs/pretrain", "folder of the run; it may stand alone: megalm status RUN", empty=False)
    watch: bool = knob(False, "look again and again, until the run is over or Ctrl-C")
    seconds: float = knob(2.0, "watch: between two looks", minimum=0.2)
    events: int = knob(6, "last events to show", minimum=0)
    output: str = knob("text", "how to print; json: one object, with watch one per line", allowed=("text", "json"))


@dataclass
class StatusRun:
    """Root of `megalm status`."""

    status: StatusConfig = section(StatusConfig)


@dataclass
class ReportConfig:
    """A run as one HTML page."""

    run_dir: str = knob("runs/pretrain", "folder of the run; it may stand alone: megalm report RUN", empty=False)
    parent: str = knob("", "folder of another run, to set its curves and its settings beside this one's; empty: none")
    output: str = knob("", "the page; empty: RUN_DIR/report.html")


@dataclass
class ReportRun:
    """Root of `megalm report`."""

    report: ReportConfig = section(ReportConfig)


@dataclass
class SweepConfig:
    """What came of the points of a sweep."""

    folder: str = knob("multirun", "hydra.sweep.dir of the sweep; it may stand alone: megalm sweep report FOLDER", empty=False)
    rows: int = knob(20, "of the table on the terminal, the best ones; 0: all", minimum=0)
    output: str = knob("", "the page; empty: FOLDER/report.html. The PNGs lie beside it")


@dataclass
class SweepRun:
    """Root of `megalm sweep`."""

    sweep: SweepConfig = section(SweepConfig)


@dataclass
class PipelineConfig:
    """Look at a pipeline schedule without running it."""

    num_microbatches: int = knob(8, "microbatches of a step", minimum=1, maximum=4096)
    forward_time: float = knob(1.0, "a microbatch's forward through all of a rank's layers, in any unit", above=0.0)
    input_time: float = knob(1.0, "its gradients of inputs", above=0.0)
    weight_time: float = knob(1.0, "its gradients of weights; a whole backward takes both", above=0.0)
    compare: bool = knob(True, "a table of all schedules of the same sizes")
    width: int = knob(0, "columns of the drawing; 0: what the terminal has", minimum=0, maximum=10000)
    output: str = knob("", "draw to this file too: .svg, or .png (needs matplotlib)")
    csv: str = knob("", "write the schedule to this file, to change it and run it with parallel.schedule=csv")


@dataclass
class PipelineRun:
    """Root of `megalm pipeline`."""

    parallel: ParallelConfig = section(ParallelConfig)
    pipeline: PipelineConfig = section(PipelineConfig)

    def __post_init__(self) -> None:
        """A schedule that lives on two chunks is shown with two, unless more are asked for."""
        if self.parallel.schedule in USUALLY_TWO and self.parallel.chunks == 1:
            self.parallel.chunks = 2


@dataclass
class ExplainConfig:
    """megalm kernels explain: which implementation of each operation would run here, and why."""

    device: str = knob("auto", "auto: cuda where there is a GPU, else cpu", allowed=("auto", "cpu", "cuda"))
    output: str = knob("text", "how to print", allowed=("text", "json"))


@dataclass
class CompileConfig:
    """megalm kernels compile: compile every kernel in every configuration, without a GPU, and look at the machine code."""

    arch: list[int] = knob(
        [80, 90, 100],
        "compute capabilities: 80 A100, 86 and 89 workstations, 90 H100 and H200, 100 B200, 120",
        allowed=(80, 86, 89, 90, 100, 120),
        empty=False,
    )
    ops: list[str] = knob([], "operations; empty: all, and only then must every table row be used", allowed=KERNELS)
    precompile: bool = knob(False, "leave the kernels in Triton's cache (TRITON_CACHE_DIR) for launches on a GPU to find")
    workers: int = knob(2, "kernels compiled at the same time", minimum=1, maximum=64)
    output: str = knob("text", "how to print", allowed=("text", "json"))


@dataclass
class BenchConfig:
    """megalm kernels bench: time every operation beside its peers, under the ceilings measured in the same process."""

    ops: list[str] = knob([], "operations; empty: all", allowed=BENCHMARKS)
    device: str = knob("auto", "auto: cuda where there is a GPU, else cpu", allowed=("auto", "cpu", "cuda"))
    quick: bool = knob(False, "few sizes and repetitions")
    peers: list[str] = knob([], "besides ours; empty: all that are installed", allowed=PEERS)
    results: str = knob("runs/kernels", "folder for the results (JSON) and pictures (PNG)", empty=False)


@dataclass
class KernelsRun:
    """Root of `megalm kernels`."""

    kernels: KernelsConfig = section(KernelsConfig)
    explain: ExplainConfig = section(ExplainConfig)
    compile: CompileConfig = section(CompileConfig)
    bench: BenchConfig = section(BenchConfig)
