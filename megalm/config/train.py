"""The run itself: how long, how large a batch, how often to look, save and report, and on which machines."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.knobs import knob

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SMALLEST_OFFLOADED = 1 << 20  # bytes; what is smaller is not worth a copy of its own
PRECISIONS = tuple(ITEM_BYTES)
BLOCK_PARTS = ("attention", "mlp", "norms")


@dataclass
class TrainConfig:
    """The training loop."""

    run_dir: str = knob(
        "runs/pretrain",
        "folder of the run: config.yaml, metrics.jsonl, checkpoints/, logs/; the same folder again resumes",
        empty=False,
    )
    steps: int = knob(1000, "optimizer steps", minimum=1)
    global_batch_size: int = knob(16, "samples per optimizer step, over all ranks", minimum=1)
    micro_batch_size: int = knob(4, "samples in one forward on one rank", minimum=1)
    seed: int = knob(1234, "initial weights and dropout", minimum=0)
    precision: str = knob(
        "fp32",
        "of weights and activations; with bf16 and fp16 master weights and reduction stay fp32, and fp16 scales the loss",
        allowed=PRECISIONS,
    )
    accumulate_fp32: bool = knob(True, "bf16, fp16: microbatches' gradients are added up in fp32, not in the precision")
    loss_scale: float = knob(65536.0, "fp16: the first loss scale; halved when a gradient overflows", above=0.0)
    loss_scale_window: int = knob(1000, "fp16: steps without overflow after which the loss scale doubles", minimum=1)
    recompute: str = knob(
        "none",
        "activations computed again in the backward instead of kept. full: blocks; selective: all but matrix products; "
        "modules: parts of blocks",
        allowed=("none", "selective", "full", "modules"),
    )
    recompute_modules: list[str] = knob(
        ["attention", "mlp"], "recompute=modules: parts of a block that keep their input alone", allowed=BLOCK_PARTS, empty=False
    )
    recompute_every: int = knob(1, "recompute in every n-th block only", minimum=1)
    offload_activations: str = knob(
        "none",
        "where blocks' activations wait for the backward. cpu: host memory, of a GPU; disk: a file without a name",
        allowed=("none", "cpu", "disk"),
    )
    offload_path: str = knob("", "offload_activations=disk: folder of that file; empty: the run's")
    deterministic: bool = knob(
        False, "the same run again gives the same bits: torch's deterministic algorithms, fixed orders of sums; slower on a GPU"
    )
    record: str = knob("", "folder for every module's output and gradient of one step, to compare two runs; empty: none")
    record_step: int = knob(1, "the step that `record` records", minimum=1)
    trace: str = knob("", "file.json: when every pipeline rank of copy 0 computed what in one step, drawn beside it; empty: none")
    trace_step: int = knob(3, "the step that `trace` records", minimum=1)
    ledger_step: int = knob(
        0, "count every collective of this step: RUN_DIR/ledger.json, and a table beside the formulae; 0: none", minimum=0
    )
    memory_step: int = knob(
        3, "measure this step's peak memory on every rank, beside what was predicted: RUN_DIR/memory.json; 0: none", minimum=0
    )
    log_every: int = knob(10, "steps between console lines", minimum=1)
    eval_every: int = knob(0, "steps between evaluations; 0: none", minimum=0)
    eval_samples: int = knob(64, "validation samples in one evaluation, rounded up to whole global batches", minimum=1)
    patience: int = knob(0, "stop after this many evaluations without a better validation loss; 0: never", minimum=0)
    device_peak_tflops: float = knob(
        0.0, "dense bf16 peak of one device, for MFU; 0: from the device's name, if known", minimum=0.0
    )


@dataclass
class CheckpointConfig:
    """What is saved, when, and what a run starts from."""

    save_every: int = knob(500, "steps between checkpoints; 0: at the end only", minimum=0)
    save_first: bool = knob(False, "also save the initial weights as step 0")
    keep: int = knob(2, "newest checkpoints to keep; 0: all", minimum=0)
    load: str = knob("", "checkpoint (or run folder) to start from when the run folder has none of its own")


@dataclass
class TrackingConfig:
    """Where metrics go besides the console and metrics.jsonl, which are always written."""

    wandb: str = knob(
        "off",
        "Weights & Biases; auto: online if there is a key, else offline",
        allowed=("off", "auto", "offline", "online"),
    )
    project: str = knob("megalm", "Weights & Biases project")
    tensorboard: bool = knob(False, "write TensorBoard events to RUN_DIR/tensorboard")
