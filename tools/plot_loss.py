"""Draw the loss curve of a run: `python tools/plot_loss.py RUN_DIR [-o PNG]`; by default RUN_DIR/loss.png.

From metrics.jsonl: the training loss of every step (thin) and its running mean, and the validation points. Where the
corpus has a manifest, a dashed line at its unigram entropy: the loss of the best model that sees no context.
Exit 2 where there is nothing to draw, or nothing to draw with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

from megalm.config.parallel import layout_name
from megalm.config.run import RunConfig
from megalm.errors import ConfigError, DataError, MegalmError, Problem

LEAST_REACH, WINDOWS = 5, 50  # steps on either side that the running mean takes in: 5, or a 50th of a long run
INK, QUIET, TRAINING, VALIDATION = "#0f172a", "#64748b", "#2563eb", "#c2410c"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that is cut is left out. Raises DataError if there are none."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise DataError(Problem(str(path), None, "no such file", "the folder of a run", "megalm pretrain train.run_dir=..."))
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    if not any("loss" in record for record in records):
        raise DataError(Problem(str(path), None, "there is no step in it", "", "train at least one step"))
    return records


def read_config(run_dir: Path) -> dict[str, Any]:
    """The run's config.yaml; empty where it is not there."""
    path = run_dir / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def find_entropy(run_dir: Path, config: dict[str, Any]) -> float | None:
    """Unigram entropy in nats from the manifest beside the run's tokens; None where there is none.

    A relative data.path starts where the run was started: here, or in a folder above the run's.
    """
    prefix = Path(config.get("data", {}).get("path") or "none")
    for start in (Path.cwd(), *run_dir.resolve().parents):
        path = start / prefix.parent / "manifest.json"
        if path.is_file():
            manifest = json.loads(path.read_text(encoding="utf-8"))
            return manifest["unigram_entropy_nats"] if f"{prefix.name}.bin" in manifest["files"] else None
    return None


def running_mean(values: list[float]) -> list[float]:
    """Mean of each value and its neighbours on both sides, so that it neither leads nor lags."""
    reach = max(LEAST_REACH, len(values) // WINDOWS)
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def describe(config: dict[str, Any]) -> str:
    """What ran, in one line; empty where the config is not known."""
    if not config:
        return ""
    run = RunConfig()
    run.parallel = type(run.parallel)(**config["parallel"])
    run.cluster.num_processes = config["cluster"]["num_processes"]
    model, train = config["model"], config["train"]
    return (
        f"{model['architecture']}, {model['num_layers']} layers of {model['hidden_size']}; "
        f"layout {layout_name(run.parallel, run.data_parallel)}; "
        f"{train['global_batch_size']} x {config['data']['seq_length']} tokens per step"
    )


def draw(records: list[dict[str, Any]], entropy: float | None, title: str, output: Path) -> None:
    """Write the picture. Raises ConfigError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        rule = "matplotlib draws the picture, and is not installed"
        raise ConfigError(Problem("matplotlib", None, rule, "", "pip install 'megalm[viz]'")) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps, losses = zip(*[(r["step"], r["loss"]) for r in records if "loss" in r], strict=True)
    valid = [(r["step"], r["valid_loss"]) for r in records if "valid_loss" in r]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    axes.plot(steps, losses, color=TRAINING, alpha=0.3, linewidth=0.8)
    axes.plot(steps, running_mean(list(losses)), color=TRAINING, linewidth=2.2, label="training, running mean")
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", color=VALIDATION, linewidth=1.2, markersize=6, label="validation")
        axes.annotate(
            f"{valid[-1][1]:.2f}", valid[-1], xytext=(0, -8), textcoords="offset points", color=VALIDATION, ha="center", va="top"
        )
    if entropy is not None:
        axes.axhline(entropy, color=QUIET, linestyle="--", linewidth=1.2, label=f"no context: unigram entropy, {entropy:.2f}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02, y=0.08)
    axes.legend(frameon=False, loc="upper right")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=160)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Draw the loss curve of a run.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="default: RUN_DIR/loss.png")
    options = parser.parse_args(arguments)
    output = options.output or options.run_dir / "loss.png"
    try:
        records, config = read_metrics(options.run_dir), read_config(options.run_dir)
        draw(records, find_entropy(options.run_dir, config), describe(config), output)
    except MegalmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
