"""Draw the figures of docs/parallelism.md: `python tools/draw_parallelism.py [-o FOLDER]`; by default docs/images.

Every figure is drawn from the code that runs: the slices that `apply_tensor_parallel` cuts, the blocks of a ring, where a
router sends tokens, the formula of model states, the schedules themselves. Exit 2 where there is nothing to draw with.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megalm.config.model import ModelConfig
from megalm.errors import ConfigError, MegalmError, Problem
from megalm.models.count import count_block_activations
from megalm.models.moe import Way
from megalm.models.plans import PLANS
from megalm.models.registry import build_model
from megalm.models.router import Router
from megalm.parallel.context_parallel import local_tokens
from megalm.parallel.expert_parallel import by_expert
from megalm.parallel.memory import ModelStates, model_states
from megalm.parallel.ring_blocks import blocks
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


Blocks = list[tuple[int, int, torch.Tensor]]  # rank, step of the ring, (S, S) bool: what it computes of the scores then


def ring_blocks(size: int, seq_length: int) -> dict[str, Blocks]:
    """What the ranks of a ring compute, in the zig-zag order of the code and in the contiguous one that it does not take."""
    causal = torch.ones(seq_length, seq_length, dtype=torch.bool).tril()
    runs, zigzag = ([local_tokens(m, size, rank, seq_length) for rank in range(size)] for m in ("ulysses", "ring"))
    found: dict[str, Blocks] = {"contiguous": [], "zig-zag": []}
    for rank, step in itertools.product(range(size), repeat=2):
        source = (rank - step) % size
        whole = torch.zeros_like(causal)
        whole[runs[rank][:, None], runs[source]] = True
        found["contiguous"].append((rank, step, whole & causal))
        seen = torch.zeros_like(causal)
        for block in blocks(size, rank, seq_length):
            if block.step == step:
                queries, keys = zigzag[rank][slice(*block.queries)], zigzag[source][slice(*block.keys)]
                seen[queries[:, None], keys] = causal[queries[:, None], keys] if block.causal else True
        found["zig-zag"].append((rank, step, seen))
    return found


def draw_zigzag(plt: Any, path: Path, size: int = 4, seq_length: int = 64) -> None:
    """The matrix of scores, coloured by rank, with the step at which each part is computed; and how long every step takes."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.6), gridspec_kw={"height_ratios": [3, 1], "hspace": 0.25, "wspace": 0.12})
    chunk = seq_length // (2 * size)
    for column, (name, parts) in enumerate(ring_blocks(size, seq_length).items()):
        matrix, bars = axes[0][column], axes[1][column]
        for rank, step, seen in parts:
            colour, width = RANKS[rank % len(RANKS)], 0.8 / size
            work = int(seen.sum()) / chunk**2
            bars.bar(step + (rank - (size - 1) / 2) * width, work, 0.9 * width, color=colour)
            for row, key in itertools.product(range(2 * size), repeat=2):
                here = seen[row * chunk : (row + 1) * chunk, key * chunk : (key + 1) * chunk]
                if here.any():
                    corners = [(key, row), (key, row + 1), (key + 1, row + 1), *([(key + 1, row)] if here.all() else [])]
                    matrix.add_patch(plt.Polygon(corners, facecolor=colour, alpha=1 - 0.2 * step, edgecolor="white", lw=0.6))
                    x, y = (0.5, 0.5) if here.all() else (0.33, 0.67)
                    matrix.text(key + x, row + y, step, ha="center", va="center", fontsize=8, color="white")
        longest = sum(max(int(seen.sum()) for _, step, seen in parts if step == t) for t in range(size)) / chunk**2
        matrix.set(xlim=(0, 2 * size), ylim=(2 * size, 0), aspect="equal", xticks=[], yticks=[], xlabel="keys", ylabel="queries")
        matrix.set_title(f"{name} order\nall steps take as long as {longest:.0f} squares", fontsize=9, color=INK)
        bars.set(xticks=range(size), ylim=(0, 4.4), yticks=[], xlabel="step of the ring")
        for axis in (matrix, bars):
            axis.spines[:].set_visible(False)
    axes[1][0].set_ylabel("work of each rank")
    handles = [plt.Rectangle((0, 0), 1, 1, color=RANKS[rank % len(RANKS)]) for rank in range(size)]
    figure.legend(handles, [f"rank {rank}" for rank in range(size)], loc="lower center", ncol=size, frameon=False, fontsize=9)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


class Routed(NamedTuple):
    """One rank's part of a dispatch."""

    tokens: list[int]  # of each row that leaves, in the order of the experts
    experts: list[int]  # of the same rows
    order: list[int]  # where each row that its experts get lies among those that arrive
    counts: list[list[int]]  # that arrive: (ranks, its experts)


def routed_tokens(ranks: int = 2, tokens: int = 6, experts: int = 4) -> list[Routed]:
    """A router's choice for some random tokens on every rank, and the ways that their rows take."""
    config = ModelConfig("llama", hidden_size=16, num_experts=experts, experts_per_token=2)
    generator = torch.Generator().manual_seed(4)
    router = Router(config)
    router.weight.data = torch.randn(router.weight.shape, generator=generator)
    chosen = [router(torch.randn(1, tokens, 16, generator=generator))[0] for _ in range(ranks)]
    ways = [Way(choice, experts, drops=False) for choice in chosen]
    counts = torch.stack([way.counts.view(ranks, -1) for way in ways])  # (from, to, experts of each)
    found = []
    for rank, (choice, way) in enumerate(zip(chosen, ways, strict=True)):
        order, _ = by_expert(counts[:, rank], int(counts[:, rank].sum()))
        leaving = choice.flatten()[way.slots]
        found.append(Routed(way.tokens.tolist(), leaving.tolist(), order.tolist(), counts[:, rank].tolist()))
    return found


def draw_dispatch(plt: Any, path: Path) -> None:
    """Tokens, their rows by expert, the rows that arrive, and the same by expert: a line is a row's way, coloured by expert."""
    routed = routed_tokens()
    ranks, each = len(routed), len(routed[0].counts[0])
    figure, axis = plt.subplots(figsize=(9, 5.4))
    heights = [max(len(part.tokens), len(part.order)) for part in routed]
    tops = [0, *itertools.accumulate(height + 2 for height in heights)]
    leaving = [[(rank, row) for row in range(len(part.tokens))] for rank, part in enumerate(routed)]
    for rank, part in enumerate(routed):
        count, top = max(part.tokens) + 1, tops[rank]
        for token in range(count):
            axis.text(0, top + (token + 0.5) * len(part.tokens) / count, f"t{token}", ha="center", va="center", fontsize=8)
        axis.text(-0.35, top + heights[rank] / 2, f"rank {rank}", ha="right", va="center", fontsize=10, color=INK)
        for row, (token, expert) in enumerate(zip(part.tokens, part.experts, strict=True)):
            start = top + (token + 0.5) * len(part.tokens) / count
            axis.plot((0.12, 0.9), (start, top + row + 0.5), color=RANKS[expert], lw=1)
            _row(plt, axis, 1, top + row, expert, f"t{token}")
        arriving = [
            place for other, rows in enumerate(leaving) for place in rows if routed[other].experts[place[1]] // each == rank
        ]
        for number, (other, row) in enumerate(arriving):
            expert, token = routed[other].experts[row], routed[other].tokens[row]
            axis.plot((1.2, 1.9), (tops[other] + row + 0.5, top + number + 0.5), color=RANKS[expert], lw=1)
            _row(plt, axis, 2, top + number, expert, f"t{token} of {other}")
            place = part.order.index(number)
            axis.plot((2.4, 2.9), (top + number + 0.5, top + place + 0.5), color=RANKS[expert], lw=1)
            _row(plt, axis, 3, top + place, expert, f"t{token} of {other}")
        for expert in range(each):
            before, rows = (sum(sum(counts[:end]) for counts in part.counts) for end in (expert, expert + 1))
            name = f"expert {rank * each + expert}"
            axis.text(3.55, top + (before + rows) / 2, name, va="center", fontsize=9, color=RANKS[rank * each + expert])
    for x, title in enumerate(("tokens", "rows by expert", "after the all-to-all", "by expert again")):
        axis.text(x + 0.15 * (x > 0), -0.9, title, ha="center", fontsize=9, color=INK)
    axis.set(xlim=(-0.8, 4.1), ylim=(tops[ranks] - 1.5, -1.8))
    axis.axis("off")
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _row(plt: Any, axis: Any, x: float, y: float, expert: int, text: str) -> None:
    width = 0.2 if x == 1 else 0.4
    axis.add_patch(plt.Rectangle((x - 0.05, y + 0.08), width, 0.84, color=RANKS[expert], lw=0))
    axis.text(x - 0.05 + width / 2, y + 0.52, text, ha="center", va="center", fontsize=7, color="white")


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
        name: {mode: count_block_activations(config, mode, 2, *split) / 1024 for mode in MODES} for name, split in layouts.items()
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
    "zigzag.svg": draw_zigzag,
    "dispatch.svg": draw_dispatch,
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
