"""Block sizes and warps of every kernel, by GPU architecture and problem size. `megalm kernels compile` checks each row.

No kernel is tuned while it trains: ranks would tune differently and compile at different times. A row's `limit` is the
largest size (a width, unless the table says otherwise) that it serves; `settings` are the kernel's compile-time arguments,
`num_warps` and `num_stages`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

ARCHS = (80, 90, 100)  # A100; H100, H200; B200. Others use the nearest below.


@dataclass(frozen=True)
class Row:
    """Settings for sizes up to `limit`; 0: any size."""

    limit: int
    settings: dict[str, Any]


TABLES: dict[str, dict[int, list[Row]]] = {}
used: set[tuple[str, int, int]] = set()  # (table, arch, limit) of every row looked up: the gate must have used them all


def _table(name: str, rows: list[Row], **by_arch: list[Row]) -> None:
    """`rows` for every architecture; sm_80=[...] and the like where one differs."""
    TABLES[name] = {arch: by_arch.get(f"sm_{arch}", rows) for arch in ARCHS}


def lookup(name: str, arch: int, size: int = 0) -> dict[str, Any]:
    """The settings of kernel table `name` on `arch` for `size`. Raises ValueError if no row is large enough."""
    known, row = _find(name, arch, size)
    used.add((name, known, row.limit))
    return row.settings


def nearest(arch: int) -> int:
    """The architecture whose rows `arch` uses."""
    return max((a for a in ARCHS if a <= arch), default=min(ARCHS))


@cache
def _find(name: str, arch: int, size: int) -> tuple[int, Row]:
    known = nearest(arch)
    for row in TABLES[name][known]:
        if size <= row.limit or row.limit == 0:
            return known, row
    raise ValueError(f"{name}: size {size} is above the largest that sm_{known} has a row for, {TABLES[name][known][-1].limit}")


# One block of lines per kernel file, in the order of the files.

# norms, for elements of 16 and of 32 bits: a row limit is the width; a BLOCK below the width means the kernels that go through
# a row in blocks. A forward thread has 32 bytes of each tensor; PROGRAMS: per multiprocessor; STAGES - 1: tiles on their way
# in shared memory. What a dropout mask takes in registers is made up for by more warps, except at 8192, where 32 have too few.
for _bits, _warps in ((16, 4), (32, 8)):
    _table(
        f"norm_forward_{_bits}",
        [
            Row(64, dict(ROWS=32, BLOCK=64, num_warps=_warps)),
            Row(128, dict(ROWS=16, BLOCK=128, num_warps=_warps)),
            Row(256, dict(ROWS=8, BLOCK=256, num_warps=_warps)),
            Row(512, dict(ROWS=4, BLOCK=512, num_warps=_warps)),
            Row(1024, dict(ROWS=2, BLOCK=1024, num_warps=_warps)),
            Row(2048, dict(ROWS=1, BLOCK=2048, num_warps=_warps)),
            Row(4096, dict(ROWS=1, BLOCK=4096, num_warps=2 * _warps)),
            Row(8192, dict(ROWS=1, BLOCK=8192, num_warps=4 * _warps)),
            Row(16384, dict(ROWS=1, BLOCK=16384, num_warps=32)),
            Row(0, dict(ROWS=1, BLOCK=4096, STAGES=2, num_warps=16)),
        ],
    )


def _in(stages: int, warps: int, **more: int) -> dict[str, Any]:
    return dict(STAGES=stages, num_warps=warps, **more)


def _norm_backward(narrow: dict, at_2048: dict, at_4096: dict, at_8192: dict, above: dict) -> list[Row]:
    """Rows up to 1024 wide are taken several at a time, 4096 elements in all; those above 8192 in blocks of columns."""
    return [
        *(Row(4096 // n, dict(ROWS=n, BLOCK=4096 // n, PROGRAMS=2, **narrow)) for n in (64, 32, 16, 8, 4)),
        Row(2048, dict(BLOCK=2048, PROGRAMS=2, **at_2048)),
        Row(4096, dict(ROWS=1, BLOCK=4096, PROGRAMS=2, **at_4096)),
        Row(8192, dict(ROWS=1, BLOCK=8192, PROGRAMS=1, **at_8192)),
        Row(0, dict(ROWS=1, PROGRAMS=2, **above)),
    ]


# By the larger of the two dtypes. ptxas spills one to three registers here and there, to reach 64 or 128 of them, and in other
# places on Triton 3.6 than on 3.9; with these settings it does so on neither.
_table("norm_backward_16", _norm_backward(_in(3, 8), _in(3, 8, ROWS=2), _in(3, 8), _in(2, 16), _in(3, 8, BLOCK=4096)))
_table(
    "norm_backward_32",
    _norm_backward(_in(2, 16), _in(2, 8, ROWS=2), _in(1, 16), _in(1, 32), _in(3, 8, BLOCK=2048)),
    sm_100=_norm_backward(_in(2, 16), _in(2, 8, ROWS=2), _in(1, 16), _in(1, 16), _in(3, 8, BLOCK=2048)),
)
_table("norm_backward_16_dropout", _norm_backward(_in(3, 16), _in(3, 16, ROWS=2), _in(3, 16), _in(1, 16), _in(3, 16, BLOCK=4096)))
_table("norm_backward_32_dropout", _norm_backward(_in(1, 16), _in(1, 8, ROWS=1), _in(1, 16), _in(1, 16), _in(3, 16, BLOCK=2048)))
_table("norm_row_means", [Row(0, dict(ROWS=1, BLOCK=4096, STAGES=2, num_warps=8))])

# fused_adam, l2_norm
_table("fused_adam", [Row(0, dict(BLOCK=1024, num_warps=4))])
_table("l2_norm", [Row(0, dict(BLOCK=8192, num_warps=8))])  # also the number of partials that one program sums at a time

# rotary: a row limit is the number of pairs, rounded up to a power of two; ROWS: tokens times heads
_table(
    "rotary",
    [
        Row(32, dict(ROWS=64, num_warps=4)),
        Row(64, dict(ROWS=32, num_warps=4)),
        Row(128, dict(ROWS=16, num_warps=4)),
        Row(0, dict(ROWS=8, num_warps=4)),
    ],
)

# activations: a row limit is the bytes of an element; each thread has 16 or 32 bytes of a row of each tensor
_table("gated", [Row(2, dict(BLOCK=2048, num_warps=4)), Row(0, dict(BLOCK=1024, num_warps=4))])
_table("gated_backward", [Row(0, dict(BLOCK=1024, num_warps=4))])
_table("bias_gelu", [Row(2, dict(ROWS=4, BLOCK=1024, num_warps=4)), Row(0, dict(ROWS=4, BLOCK=512, num_warps=4))])
_table("bias_gelu_backward", [Row(2, dict(ROWS=2, BLOCK=1024, num_warps=4)), Row(0, dict(ROWS=2, BLOCK=512, num_warps=4))])

# column_sums, of norms and activations
_table("column_sums", [Row(0, dict(ROWS=32, BLOCK=32, num_warps=4))])

# cross_entropy: the size is the number of columns
_BY_COLUMNS = [Row(1024, dict(BLOCK=1024, num_warps=4)), Row(0, dict(BLOCK=4096, num_warps=8))]
_table("cross_entropy_statistics", _BY_COLUMNS)
_table("cross_entropy_gradient", _BY_COLUMNS)

# grouped_linear, for elements of 16 and of 32 bits: a row limit is the rows of a group, on average; _weight: its gradient, whose
# BLOCK_K are rows. fp32 multiplies without tensor cores.


def _product(m: int, n: int, k: int, warps: int, stages: int) -> dict[str, Any]:
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=warps, num_stages=stages)


_table(
    "grouped_linear_16",
    [Row(64, _product(64, 128, 64, 4, 3)), Row(0, _product(128, 128, 64, 8, 3))],
    sm_80=[Row(64, _product(64, 128, 32, 4, 4)), Row(0, _product(128, 128, 32, 8, 4))],
    sm_90=[Row(64, _product(64, 128, 64, 4, 4)), Row(0, _product(128, 256, 64, 8, 3))],
)
_table("grouped_linear_32", [Row(0, _product(64, 64, 32, 8, 2))])
_table(
    "grouped_linear_weight_16",
    [Row(0, _product(128, 128, 64, 8, 3))],
    sm_80=[Row(0, _product(128, 128, 32, 8, 4))],
    sm_90=[Row(0, _product(128, 256, 64, 8, 3))],
)
_table("grouped_linear_weight_32", [Row(0, _product(64, 64, 32, 8, 2))])

# attention_decode, for elements of 16 and of 32 bits: a row limit is the width of a head, rounded up to a power of two. ROWS:
# queries of a program; BLOCK: its keys at a time. fp32 multiplies without tensor cores, where rows cost registers.
_table(
    "attention_decode_16",
    [
        Row(64, dict(ROWS=16, BLOCK=128, num_warps=4, num_stages=3)),
        Row(128, dict(ROWS=16, BLOCK=64, num_warps=4, num_stages=3)),
        Row(256, dict(ROWS=16, BLOCK=32, num_warps=4, num_stages=3)),
    ],
)
_table(
    "attention_decode_16_several",
    [
        Row(64, dict(ROWS=64, BLOCK=64, num_warps=4, num_stages=2)),
        Row(128, dict(ROWS=64, BLOCK=32, num_warps=4, num_stages=3)),
        Row(256, dict(ROWS=64, BLOCK=32, num_warps=8, num_stages=2)),
    ],
)
_table(
    "attention_decode_32",
    [
        Row(64, dict(ROWS=16, BLOCK=32, num_warps=4, num_stages=3)),
        Row(256, dict(ROWS=16, BLOCK=16, num_warps=4, num_stages=2)),
    ],
)
_table("attention_decode_merge", [Row(128, dict(BLOCK=32, num_warps=4)), Row(256, dict(BLOCK=16, num_warps=4))])

# attention: a row limit is the head dimension; dkdv goes through queries, dq through keys, backward does both in one pass.
# What decides is that ptxas spills nothing, on Triton 3.6 and on 3.9, with packed sequences and a window as well. On sm_90 the
# forward has 108 to 128 registers where D is 64, so that two programs share a multiprocessor and one computes exponentials while
# the other multiplies. A bound of 128 registers is met without spilling where D is 128, too, but then ptxas waits for every
# product by itself. On sm_80 each warp holds all keys of a tile. sm_100 is not tuned: it shares its rows with sm_120, whose
# shared memory is small. _more: with ALiBi, softcap or dropout in the backward, with dropout in the forward: Philox takes
# registers, which tiles give. 32: of fp32, which is multiplied without tensor cores.


def _tiles(*sizes: tuple[int, tuple[int, int, int, int]]) -> list[Row]:
    return [Row(dim, dict(BLOCK_Q=q, BLOCK_K=k, num_warps=warps, num_stages=stages)) for dim, (q, k, warps, stages) in sizes]


_table(
    "attention_forward_16",
    _tiles((64, (128, 64, 8, 2)), (128, (128, 32, 8, 2)), (256, (64, 32, 8, 1))),
    sm_80=_tiles((64, (128, 64, 8, 3)), (128, (128, 32, 8, 3)), (256, (64, 32, 8, 2))),
    sm_90=_tiles((64, (128, 64, 8, 3)), (128, (128, 128, 8, 2)), (256, (128, 64, 8, 2))),
)
_table(
    "attention_forward_16_more",
    _tiles((64, (128, 64, 8, 2)), (128, (128, 32, 8, 2)), (256, (64, 32, 8, 2))),
    sm_80=_tiles((64, (128, 32, 8, 3)), (128, (128, 32, 8, 3)), (256, (32, 32, 8, 1))),
    sm_90=_tiles((64, (128, 64, 8, 3)), (128, (128, 32, 8, 3)), (256, (64, 32, 8, 2))),
)
_table(
    "attention_forward_32",
    _tiles((256, (32, 32, 8, 1))),
    sm_80=_tiles((64, (32, 32, 8, 1)), (128, (16, 32, 8, 1)), (256, (32, 32, 8, 1))),
)
_table(
    "attention_dkdv_16",
    _tiles((64, (64, 64, 8, 2)), (128, (32, 64, 8, 1)), (256, (32, 32, 8, 1))),
    sm_80=_tiles((128, (32, 64, 8, 2)), (256, (32, 32, 8, 1))),
    sm_90=_tiles((64, (64, 128, 8, 2)), (128, (32, 128, 8, 2)), (256, (32, 32, 8, 1))),
)
_table(
    "attention_dkdv_16_more",
    _tiles((128, (32, 64, 8, 1)), (256, (16, 16, 8, 1))),
    sm_80=_tiles((64, (32, 64, 8, 1)), (128, (32, 64, 8, 2)), (256, (16, 16, 8, 1))),
    sm_90=_tiles((64, (32, 128, 8, 2)), (128, (32, 64, 8, 2)), (256, (32, 32, 8, 2))),
)
_table(
    "attention_dkdv_32",
    _tiles((64, (16, 32, 8, 1)), (256, (16, 16, 8, 1))),
    sm_80=_tiles((64, (16, 32, 8, 1)), (128, (32, 16, 8, 1)), (256, (16, 32, 8, 1))),
)
_table(
    "attention_dq_16",
    _tiles((64, (64, 64, 8, 2)), (128, (64, 64, 8, 1)), (256, (64, 32, 8, 1))),
    sm_80=_tiles((64, (128, 64, 8, 2)), (128, (64, 64, 8, 2)), (256, (64, 32, 8, 1))),
    sm_90=_tiles((64, (128, 128, 8, 2)), (128, (128, 64, 8, 2)), (256, (64, 32, 8, 2))),
)
_table(
    "attention_dq_16_more",
    _tiles((64, (64, 64, 8, 1)), (128, (32, 32, 8, 1)), (256, (16, 32, 8, 1))),
    sm_80=_tiles((64, (128, 32, 8, 2)), (128, (64, 32, 8, 2)), (256, (16, 64, 4, 1))),
    sm_90=_tiles((64, (128, 64, 8, 2)), (128, (128, 32, 8, 2)), (256, (64, 16, 8, 2))),
)
_table(
    "attention_dq_32",
    _tiles((64, (32, 32, 8, 1)), (128, (16, 32, 8, 1)), (256, (32, 16, 8, 1))),
    sm_80=_tiles((32, (16, 32, 8, 1)), (128, (32, 32, 8, 1)), (256, (16, 32, 8, 1))),
)
_table(
    "attention_backward_16",
    _tiles((128, (64, 64, 8, 1)), (256, (32, 32, 8, 1))),
    sm_80=_tiles((128, (32, 64, 8, 2)), (256, (16, 16, 8, 1))),
    sm_90=_tiles((64, (64, 128, 8, 2)), (128, (32, 128, 8, 2)), (256, (32, 32, 8, 1))),
)
_table(
    "attention_backward_16_more",
    _tiles((64, (32, 64, 8, 1)), (128, (32, 32, 8, 1)), (256, (16, 32, 8, 1))),
    sm_80=_tiles((128, (32, 64, 8, 2)), (256, (32, 16, 8, 1))),
    sm_90=_tiles((64, (32, 128, 8, 2)), (128, (32, 64, 8, 2)), (256, (32, 32, 8, 1))),
)
_table(
    "attention_backward_32",
    _tiles((64, (16, 32, 8, 1)), (256, (16, 16, 8, 1))),
    sm_80=_tiles((64, (32, 16, 8, 1)), (128, (16, 32, 8, 1)), (256, (32, 16, 8, 1))),
)
_table("attention_delta", [Row(128, dict(BLOCK=64, num_warps=8)), Row(256, dict(BLOCK=32, num_warps=8))])

# attention_hopper, of sm_90 alone: a row limit is the head dimension. STAGES: buffers of keys and of values; of the 65536
# registers of a multiprocessor the two groups that compute get 240 per thread each, the warps beside the loading one 24.
_table(
    "attention_hopper",
    [],
    sm_90=[
        Row(64, dict(STAGES=3, COMPUTE_REGISTERS=240, LOAD_REGISTERS=24, num_warps=4)),
        Row(128, dict(STAGES=2, COMPUTE_REGISTERS=240, LOAD_REGISTERS=24, num_warps=4)),
    ],
)
