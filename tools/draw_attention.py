"""Draw the figure of docs/kernels.md: `python tools/draw_attention.py [-o FOLDER]`; by default docs/images. --table: its table.

Which tiles of the score matrix a forward visits under three masks, which of them need the mask, and in which order programs
take the rows. Drawn by the functions that the kernels call, `key_blocks` and `place_in`, run as plain Python. exit 2 where
there is nothing to draw with. The table says which implementation has which feature, from what the checks of a call go by.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from megalm.errors import MegalmError
from megalm_kernels.arguments import FLOATS
from megalm_kernels.attention.call import ALL, DTYPES, FEATURES, SUPPORT, has
from megalm_kernels.device.attention_tiles import key_blocks, place_in

ROOT = Path(__file__).resolve().parents[1]
STYLE = runpy.run_path(str(ROOT / "tools" / "draw_parallelism.py"))
BLOCK_Q, BLOCK_K = 128, 128
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
TOKENS = 2048
WHOLE, EDGE = "no mask", "masked"
COLOURS = {WHOLE: "#2563eb", EDGE: "#c2410c"}
MASKS: dict[str, tuple[tuple[int, ...], int, int]] = {  # name: lengths, left, right
    "causal": ((TOKENS,), ALL, 0),
    "window of 511 keys to the left": ((TOKENS,), 511, 0),
    "four packed documents": ((800, 208, 600, 440), ALL, 0),
}


@dataclass(frozen=True)
class Row:
    """What one program does: queries first .. first + BLOCK_Q - 1 of a sequence that begins at `start`, over these tiles."""

    start: int
    length: int
    first: int
    tiles: tuple[tuple[int, str], ...]  # (first key of the sequence, kind)


def rows_of(lengths: tuple[int, ...], left: int, right: int, block_q: int = BLOCK_Q, block_k: int = BLOCK_K) -> list[Row]:
    """The programs of one head, in their order. One sequence is not packed; of several each has slots for its blocks."""
    starts = [0, *accumulate(lengths)]
    packed = len(lengths) > 1
    blocks = starts[-1] // block_q + len(lengths) if packed else -(-lengths[0] // block_q)
    rows = []
    for program in range(blocks):
        slot, _ = place_in.fn(program, blocks, 1, 1)
        sequence, block = packed_place(slot, starts, block_q) if packed else (0, slot)
        if block * block_q < lengths[sequence]:  # else an empty slot
            length, first = lengths[sequence], block * block_q
            rows.append(Row(starts[sequence], length, first, tiles_of(first, length, left, right, block_q, block_k)))
    return rows


def packed_place(slot: int, starts: list[int], block: int) -> tuple[int, int]:
    """(sequence, block in it) of a slot, as `packed_block` has it."""
    sequence = max(s for s, start in enumerate(starts[:-1]) if start // block + s <= slot)
    return sequence, slot - starts[sequence] // block - sequence


def tiles_of(first: int, length: int, left: int, right: int, block_q: int, block_k: int) -> tuple[tuple[int, str], ...]:
    """Of one block of queries, as the loops of the forward visit them."""
    begin, full, end_full, end = key_blocks.fn(first, length, length, left, right, block_q, block_k, left >= 0, right >= 0)
    before = range(begin, min(full, end), block_k) if left >= 0 else ()
    loops = ((before, EDGE), (range(full, end_full, block_k), WHOLE), (range(end_full, end, block_k), EDGE))
    return tuple((key, kind) for keys, kind in loops for key in keys)


def draw(plt: Any, path: Path) -> None:
    """A panel per mask: queries downwards, keys to the right."""
    ink, paper = STYLE["INK"], STYLE["PAPER"]
    figure, axes = plt.subplots(1, len(MASKS), figsize=(13, 4.9), gridspec_kw={"wspace": 0.12})
    for axis, (name, (lengths, left, right)) in zip(axes, MASKS.items(), strict=True):
        axis.add_patch(plt.Rectangle((0, 0), TOKENS, TOKENS, color=paper, lw=0))
        rows = rows_of(lengths, left, right)
        for order, row in enumerate(rows):
            y, height = row.start + row.first, min(BLOCK_Q, row.length - row.first)
            for key, kind in row.tiles:
                width = min(BLOCK_K, row.length - key)
                place = (row.start + key, y)
                axis.add_patch(plt.Rectangle(place, width, height, facecolor=COLOURS[kind], edgecolor="white", lw=0.8))
            axis.text(-25, y + height / 2, str(order + 1), ha="right", va="center", fontsize=7, color=ink)
        kinds = [kind for row in rows for _, kind in row.tiles]
        counts = f"{len(kinds)} tiles, {kinds.count(EDGE)} masked"
        axis.set(xlim=(-5, TOKENS), ylim=(TOKENS, -5), aspect="equal", xticks=[], yticks=[])
        axis.set_title(f"{name}: {counts}", fontsize=10, color=ink)
        axis.set_xlabel("keys", fontsize=9, color=ink)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("queries, and which program takes them", fontsize=9, color=ink, labelpad=22)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (*COLOURS.values(), paper)]
    labels = ["every query sees every key: no mask", "the mask is computed", "not visited"]
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False, fontsize=9)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def feature_table() -> str:
    """Markdown."""
    names = {**{name: f"`{name}`" for name in SUPPORT}, "hopper": "warp-specialised", "decode": "`decode_attention`"}
    lines = ["| | " + " | ".join(names[name] for name in SUPPORT) + " |", "|---" * (len(SUPPORT) + 1) + "|"]
    for feature in (*FEATURES, "gradients"):
        cells = []
        for name in SUPPORT:
            places = [has(name, feature, device_type) for device_type in ("cpu", "cuda")]
            cells.append("yes" if all(places) else "on a CPU" if places[0] else "")
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    dtypes = (", ".join(SHORT[dtype] for dtype in DTYPES.get(name, FLOATS)) for name in SUPPORT)
    return "\n".join([*lines, f"| dtypes | {' | '.join(dtypes)} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the table of features instead")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "images", help="folder for the figure")
    options = parser.parse_args()
    if options.table:
        print(feature_table())
        return
    folder = options.output
    try:
        plt = STYLE["load_pyplot"]()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"cannot write to {folder}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except MegalmError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    draw(plt, folder / "attention_blocks.svg")
    print(folder / "attention_blocks.svg")


if __name__ == "__main__":
    main()
