"""Draw the figures of docs/parallelism.md: `python tools/draw_parallelism.py [-o FOLDER]`; by default docs/images.

Every figure is drawn from the code that runs: the slices that `apply_tensor_parallel` cuts, the formula of model states,
the schedules themselves. Exit 2 where there is nothing to draw with.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megalm.config.model import ModelConfig
from megalm.errors import ConfigError, MegalmError, Problem
from megalm.models.count import count_block_activations
from megalm.models.plans import PLANS
from megalm.models.registry import build_model
from megalm.parallel.memory import ModelStates, model_states
from megalm.parallel.schedule_picture import Panel, save_picture
from megalm.parallel.schedules import build_schedule
from megalm.parallel.tensor_parallel import Shard, apply_tensor_parallel, shard_of
from megalm.parallel.timeline import Times, simulate
from megalm.parallel.topology import Group, tensor_topology

ROOT = Path(__file__).resolve().parents[1]
INK, QUIET, PAPER = "#0f172a", "#64748b", "#f1f5f9"
RANKS = ("#2563eb", "#c2410c", "#15803d", "#7e22ce")
STATES = {"weights": "#2563eb", "gradients": "#c2410c", "masters": "#15803d", "moments": "#7e22ce", "buckets": "#64748b"}
MODES = ("none", "selective", "full")
SHOWN = (
    "embedding", "layers.0.attention.q", "layers.0.attention.k", "layers.0.attention.v", "layers.0.attention.out",
    "layers.0.mlp.gate", "layers.0.mlp.up", "layers.0.mlp.down", "head",
)  # fmt: skip


def shards_by_rank(size: int) -> dict[str, list[tuple[Shard, tuple[int, ...]]]]:
    """{module: one (shard, local shape) per rank} of a small LLaMA whose sizes do not divide by `size`."""
    config = ModelConfig("llama", vocab_size=250, hidden_size=64, num_layers=1, num_heads=8, num_kv_heads=2, ffn_size=176)
    found: dict[str, list[tuple[Shard, tuple[int, ...]]]] = {name: [] for name in SHOWN}
    for rank in range(size):
        topology = tensor_topology(Group(tuple(range(size)), rank), torch.device("meta"))
        with torch.device("meta"):
            model = build_model(config)
        apply_tensor_parallel(model, PLANS["llama"], topology)
        for name in SHOWN:
            weight = model.get_submodule(name).weight
            assert isinstance(weight, torch.nn.Parameter)
            found[name].append((shard_of(weight), tuple(weight.shape)))
    return found


def draw_tensor_parallel(plt: Any, path: Path, size: int = 4) -> None:
    """Each matrix in its proportions, coloured by the rank that holds it."""
    shards = shards_by_rank(size)
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(14, 3.4), gridspec_kw={"wspace": 0.5})
    for axis, (name, parts) in zip(axes, shards.items(), strict=True):
        rows, columns = parts[0][0].global_shape
        for rank, (shard, shape) in enumerate(parts):
            y, x = shard.offset
            height, width = shape
            share = width / shard.copies  # copies of one slice stand side by side
            colour = RANKS[rank % len(RANKS)]
            axis.add_patch(plt.Rectangle((x + shard.copy * share, y), share, height - shard.padding, color=colour, lw=0))
            if shard.padding:
                place = (x, y + height - shard.padding)
                axis.add_patch(plt.Rectangle(place, width, shard.padding, fill=False, ec=colour, hatch="//////", lw=0))
        padded = max(shard.offset[0] + shape[0] for shard, shape in parts)
        axis.set(xlim=(0, columns), ylim=(max(rows, padded), 0), aspect="equal", xticks=[], yticks=[])
        copies = f"\n{parts[0][0].copies} copies" if parts[0][0].copies > 1 else ""
        padding = f"\n{padded - rows} rows padding" if padded > rows else ""
        axis.set_title(f"{name.removeprefix('layers.0.')}\n{rows} x {columns}{copies}{padding}", fontsize=8, color=INK)
        axis.spines[:].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=RANKS[rank]) for rank in range(size)]
    labels = [f"rank {rank}" for rank in range(size)]
    figure.legend(handles, labels, loc="lower center", ncol=size, frameon=False, fontsize=9)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def zero_cases(parameters: int, copies: int) -> dict[str, ModelStates]:
    """Model states of the bf16 layouts that the figure compares."""
    cases = {f"zero {zero}": model_states(parameters, copies, zero, "bf16") for zero in range(4)}
    for zero in (2, 3):
        cases[f"zero {zero}\nmicrobatch"] = model_states(parameters, copies, zero, "bf16", in_backward=True)
    return cases


def draw_zero(plt: Any, path: Path, parameters: int = 7_000_000_000, copies: int = 8) -> None:
    """Bytes of one rank, stacked, for every ZeRO stage."""
    figure, axis = plt.subplots(figsize=(8, 3.6))
    for place, (name, states) in enumerate(zero_cases(parameters, copies).items()):
        bottom = 0.0
        for kind, colour in STATES.items():
            size = getattr(states, kind) / 1e9
            axis.bar(place, size, 0.65, bottom=bottom, color=colour, label=kind if place == 0 else None)
            bottom += size
        axis.text(place, bottom + 1, f"{bottom:.0f} GB", ha="center", fontsize=9, color=INK)
        axis.text(place, -3, name, ha="center", va="top", fontsize=9, color=INK)
    axis.set(xticks=[], ylim=(0, 130), ylabel="GB per rank")
    axis.set_title(f"model states of {parameters / 1e9:.0f}B parameters in bf16 over {copies} copies", fontsize=10, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def draw_schedules(plt: Any, path: Path, ranks: int = 4, microbatches: int = 8) -> None:
    """The same step in four schedules, one time axis for all."""
    panels = []
    for name, chunks in (("1f1b", 1), ("interleaved", 2), ("zbh1", 1), ("zbv", 2)):
        timeline = simulate(build_schedule(name, ranks, microbatches, chunks), Times().per_chunk(chunks))
        panels.append(Panel(f"{name}: bubble {timeline.bubble:.1%}", timeline))
    save_picture(str(path), panels, "output")


def activation_cases() -> dict[str, dict[str, float]]:
    """{layout: {recompute mode: KiB per token that one block of LLaMA 8B keeps on a rank, bf16}}."""
    config = ModelConfig("llama", 128256, 4096, 32, 32, 8, ffn_size=14336, max_seq_length=8192)
    layouts = {"one rank": (1, False), "tp8": (8, False), "tp8_sp": (8, True)}
    return {
        name: {mode: count_block_activations(config, mode, 2, *split) / 1024 for mode in MODES}
        for name, split in layouts.items()
    }


def draw_activations(plt: Any, path: Path) -> None:
    """What sequence parallelism and recomputation leave of a block's activations."""
    figure, axis = plt.subplots(figsize=(8, 3.2))
    for group, (name, sizes) in enumerate(activation_cases().items()):
        for place, (mode, size) in enumerate(sizes.items()):
            x = group + (place - 1) * 0.27
            axis.bar(x, size, 0.25, color=RANKS[place], label=f"recompute={mode}" if group == 0 else None)
            axis.text(x, size * 1.08, f"{size:.3g}", ha="center", fontsize=8, color=INK)
        axis.text(group, 0.62, name, ha="center", va="top", fontsize=9, color=INK)
    axis.set(xticks=[], yscale="log", ylim=(0.7, 500), ylabel="KiB per token")
    axis.set_title("activations that one block of LLaMA 8B keeps on a rank, bf16", fontsize=10, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def states_table(parameters: int, copies: int) -> str:
    """The same numbers as Markdown."""
    names = [field.name for field in dataclasses.fields(ModelStates) if field.name in STATES]
    rows = ["| layout | " + " | ".join(names) + " | GB per rank |", "|---" * (len(names) + 2) + "|"]
    for name, states in zero_cases(parameters, copies).items():
        sizes = " | ".join(f"{getattr(states, kind) / 1e9:.1f}" for kind in names)
        rows.append(f"| {name.replace(chr(10), ', ')} | {sizes} | {states.total / 1e9:.1f} |")
    return "\n".join(rows)


FIGURES: dict[str, Callable[[Any, Path], None]] = {
    "tensor_parallel.svg": draw_tensor_parallel,
    "schedules.svg": draw_schedules,
    "zero.svg": draw_zero,
    "activations.svg": draw_activations,
}


def load_pyplot() -> Any:
    """matplotlib without a display. Raises ConfigError where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(Problem("matplotlib", None, "draws the figures", "", "pip install 'megalm[viz]'")) from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "megalm", "svg.fonttype": "none", "hatch.linewidth": 0.6})
    import matplotlib.pyplot as plt

    return plt


def main() -> None:
    """Draws all figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "images", help="folder for the figures")
    folder = parser.parse_args().output
    try:
        plt = load_pyplot()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"cannot write to {folder}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except MegalmError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    for name, draw in FIGURES.items():
        draw(plt, folder / name)
        print(folder / name)


if __name__ == "__main__":
    main()
