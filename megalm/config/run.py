"""The roots: one dataclass per verb, made of sections."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.cluster import ClusterConfig, SlurmConfig
from megalm.config.data import DataConfig
from megalm.config.kernels import KernelsConfig
from megalm.config.knobs import knob, section
from megalm.config.model import ModelConfig
from megalm.config.optim import OptimConfig
from megalm.config.parallel import ParallelConfig
from megalm.config.tasks import DoctorRun, GenerateRun, KernelsRun, PipelineRun, PrepareRun, ReportRun, StatusRun, SweepRun
from megalm.config.train import CheckpointConfig, TrackingConfig, TrainConfig


@dataclass
class RunConfig:
    """Root of `megalm pretrain`."""

    model: ModelConfig = section(ModelConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    data: DataConfig = section(DataConfig)
    optim: OptimConfig = section(OptimConfig)
    train: TrainConfig = section(TrainConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    tracking: TrackingConfig = section(TrackingConfig)
    cluster: ClusterConfig = section(ClusterConfig)
    kernels: KernelsConfig = section(KernelsConfig)
    slurm: SlurmConfig = section(SlurmConfig)

    @property
    def data_parallel(self) -> int:
        """Ranks that read other samples. Only meaningful once `cluster.num_processes` is known and validated."""
        return max(1, self.cluster.num_processes // self.parallel.ranks_per_sample)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, experts apart: over them gradients are summed, and ZeRO shares out."""
        return self.data_parallel * self.parallel.context_parallel

    @property
    def num_microbatches(self) -> int:
        """Forwards per rank and optimizer step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.data_parallel)

    @property
    def local_tokens(self) -> int:
        """One microbatch's tokens on one rank."""
        return self.train.micro_batch_size * self.data.seq_length // self.parallel.context_parallel


@dataclass
class ParityConfig:
    """Prove that layouts compute what one rank computes."""

    layouts: list[str] = knob(
        ["tp2", "pp2", "dp2_zero0", "tp2_pp2"],
        "short names of layouts to compare with one rank; all: every legal one on up to 8 ranks (all4: up to 4); sample: a few",
    )
    models: list[str] = knob([], "architectures: llama, gpt (with tied embeddings); empty: that of model.*")
    steps: int = knob(20, "optimizer steps to compare", minimum=1)
    loss_tolerance: float = knob(1e-5, "largest difference of the loss", above=0.0)
    norm_tolerance: float = knob(1e-5, "largest relative difference of the gradient norm", above=0.0)
    weight_tolerance: float = knob(1e-4, "largest difference of a final weight", above=0.0)
    repeat: bool = knob(
        False, "run every layout twice, with train.deterministic, and compare all that both leave behind to the bit"
    )
    work_dir: str = knob("runs/parity", "folder for the runs")
    keep: bool = knob(False, "keep the runs' folders")
    report: str = knob("", "write the table to FILE.html or FILE.md, or to both, joined by a comma")


@dataclass
class ParityRun(RunConfig):
    """Root of `megalm parity`: the run to repeat on every layout, and what to compare."""

    parity: ParityConfig = section(ParityConfig)


ROOTS: dict[str, type] = {
    "prepare": PrepareRun,
    "pretrain": RunConfig,
    "generate": GenerateRun,
    "doctor": DoctorRun,
    "parity": ParityRun,
    "pipeline": PipelineRun,
    "kernels": KernelsRun,
    "status": StatusRun,
    "report": ReportRun,
    "sweep": SweepRun,
}
