"""Sections `cluster`, the processes of a run and what watches them, and `slurm`, a job on a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.knobs import knob


@dataclass
class ClusterConfig:
    """The machines."""

    name: str = knob(
        "local",
        "local: this machine; workers are started here unless torchrun or srun has started them; slurm: submit instead",
        allowed=("local", "slurm"),
    )
    num_processes: int = knob(
        0, "processes in all (world size); 0: one per GPU, or what the layout needs where there is none", minimum=0
    )
    device: str = knob("auto", "auto: cuda where there is a GPU, else cpu", allowed=("auto", "cpu", "cuda"))
    port: int = knob(0, "rendezvous port on this machine; 0: any free one", minimum=0, maximum=65535)
    rendezvous_seconds: int = knob(300, "how long the first ranks wait for the last one to start", minimum=1)
    timeout_seconds: int = knob(600, "a collective that takes longer ends the run", minimum=1)
    threads: int = knob(0, "CPU threads per process; 0: the cores shared evenly", minimum=0, maximum=512)
    max_restarts: int = knob(
        0, "starts in place after a rank died or hung, in a row without a new checkpoint; 0: none", minimum=0
    )
    stall_seconds: float = knob(
        0.0, "a rank without a sign of life for so long has stalled; 0: three times the longest step, at least 30 s", minimum=0.0
    )


@dataclass
class SlurmConfig:
    """A job of `megalm slurm`, of `cluster=slurm` and of `hydra/launcher=megalm_slurm`."""

    nodes: int = knob(1, "nodes to train on", minimum=1)
    spares: int = knob(0, "nodes to ask for besides: the job trains on the healthy ones", minimum=0)
    gpus_per_node: int = knob(0, "GPUs to ask for on each node; 0: none", minimum=0)
    processes_per_node: int = knob(0, "ranks on a node; 0: one per GPU, or what the layout needs, shared evenly", minimum=0)
    cpus_per_task: int = knob(0, "CPUs to ask for per node's task; 0: the cluster's default", minimum=0)
    minutes: int = knob(60, "time limit; the run saves before it and goes back to the queue", minimum=1)
    partition: str = knob("", "partition; empty: the cluster's default")
    account: str = knob("", "account that is charged; empty: your default")
    qos: str = knob("", "quality of service; empty: the default")
    constraint: str = knob("", "features that nodes must have; empty: any")
    reservation: str = knob("", "reservation; empty: none")
    exclude: str = knob("", "nodes not to take, as SLURM writes them: n[3-5],n9")
    job_name: str = knob("megalm", "name of the job", empty=False)
    launch: str = knob(
        "agent", "agent: one task per node, which supervises its ranks; rank: one srun task per rank", allowed=("agent", "rank")
    )
    save_seconds: int = knob(120, "the run is asked to save so long before the time limit", minimum=10)
    requeue: bool = knob(True, "go back to the queue after the time limit, preemption, a bad node or a failure")
    chain: int = knob(0, "where requeue is off: submit so many jobs of this name that run one after the other; 0: one", minimum=0)
    max_failures: int = knob(3, "failed starts in a row without a new checkpoint, before the job gives up", minimum=1)
    max_starts: int = knob(50, "starts of the job in all", minimum=1)
    setup: str = knob("", "shell file that each node's task sources first, such as one that loads modules; empty: none")
    container: str = knob("", "image that the tasks run in, whose `python` has megalm; empty: none")
    container_tool: str = knob(
        "pyxis", "what runs it: pyxis (an option of srun, with enroot) or apptainer", allowed=("pyxis", "apptainer")
    )
    container_mounts: str = knob("", "host:container pairs, joined by commas")
    extra: list[str] = knob([], "further options of sbatch, such as --mail-type=END")
