"""The kernel of device/attention_hopper.py without a GPU: its arithmetic, every order of its barriers, and what ptxas made of it.

gluon_machine.py executes the source of the kernel itself; what that models, and what not, is said there.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton import knobs

from megalm_kernels import cubin
from megalm_kernels.attention.hopper import HEAD_DIMS, TILE
from megalm_kernels.attention.hopper_trial import Case, find_fault, make
from megalm_kernels.compile_gate import _compile, _pretended_gpu
from megalm_kernels.device import attention_hopper
from megalm_kernels.launch import Launch, capture
from megalm_kernels.specimens import _add, identity
from tests.kernels.gluon_machine import Fault, Machine, Traces, explore, run, traces

CPU = torch.device("cpu")
CASES = {
    "tiles of queries": Case((1, 384, 384, 1, 1, 64), True),
    "groups and sequences": Case((2, 128, 384, 4, 2, 64), True),
    "more keys": Case((1, 256, 640, 1, 1, 128), True, torch.float16),
    "all keys": Case((1, 128, 896, 2, 1, 128), False),
    "all keys, two tiles": Case((2, 256, 128, 1, 1, 64), False, torch.float16),
    "one block": Case((1, 128, 128, 1, 1, 64), True),
}


def launched(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float) -> tuple[Launch, tuple[Tensor, Tensor]]:
    with capture(90) as launches:
        result = attention_hopper.forward(q, k, v, left, right, scale)
    (launch,) = launches
    return launch, result


def executed(seed: int, edit: Callable[[str], str] = str) -> Callable[..., tuple[Tensor, Tensor]]:
    """`forward`, done by the machine in an order that hangs on the seed; memory that is not written stays NaN."""
    generator = random.Random(seed)

    def forward(*args: object) -> tuple[Tensor, Tensor]:
        launch, result = launched(*args)  # type: ignore[arg-type]
        for x in result:
            x.fill_(torch.nan)
        run(launch, generator.randrange, edit)
        return result

    return forward


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_as_it_is_written_gives_the_formula(name: str) -> None:
    assert find_fault(executed(seed=1), CPU, [CASES[name]], repeats=1) == ""


def test_no_order_changes_a_bit() -> None:
    case = CASES["more keys"]
    inputs = (*make(case, CPU), -1, 0, 0.125)
    first, *others = [executed(seed)(*inputs) for seed in range(4)]
    for other in others:
        assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])


def test_rows_that_are_apart_are_not_copied() -> None:
    case = Case((2, 128, 128, 2, 2, 64), True)
    q, k, v = make(case, CPU)
    fused = torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1)
    parts = [x.unflatten(-1, (2, 64)) for x in fused.split(128, dim=-1)]
    launch, _ = launched(*parts, -1, 0, 0.125)
    assert [launch.args[i].base.data_ptr() for i in range(3)] == [x.data_ptr() for x in parts]
    want, got = executed(0)(q, k, v, -1, 0, 0.125), executed(0)(*parts, -1, 0, 0.125)
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])


@pytest.mark.parametrize("turn", [lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x[..., :1].expand_as(x)])
def test_what_no_descriptor_describes_is_copied(turn: Callable[[Tensor], Tensor]) -> None:
    q, k, v = (turn(x) for x in make(Case((1, 128, 128, 2, 2, 64), True), CPU))
    launch, _ = launched(q, k, v, -1, 0, 0.125)
    assert all(launch.args[i].base.is_contiguous() for i in range(3))
    assert torch.equal(launch.args[1].base, k)


def test_sizes_do_not_compile_anew() -> None:
    cases = [Case((batch, 128, keys, heads, 1, 64), True) for batch, keys, heads in ((1, 128, 1), (2, 384, 3), (3, 1280, 4))]
    launches = [launched(*make(case, CPU), -1, 0, 0.125)[0] for case in cases]
    assert len({identity(launch) for launch in launches}) == 1
    other = launched(*make(replace(cases[0], dtype=torch.float16), CPU), -1, 0, 0.125)[0]
    assert identity(other) != identity(launches[0])


_TAKE, _GIVE = "s = warpgroup_mma_wait(1, deps=[going])", "mbarrier.arrive(k_empty.index(stage), count=1)"
EDITS = {
    "a row does not see itself": (r"gl.expand_dims(rows, 1) >= ", "gl.expand_dims(rows, 1) > "),
    "the mask of the other group": ("rows = group * _ROWS +", "rows ="),
    "no mask": ("if CAUSAL:\n        columns", "if False:\n        columns"),
    "the diagonal a block too early": ("visited = blocks - (tiles - 1 - tile)", "visited = max(1, blocks - (tiles - tile))"),
    "the result is not rescaled": ("convert_layout(shrink, out_row_of), 1)", "convert_layout(shrink, out_row_of), 1) ** 0"),
    "the sum is not rescaled": ("total = total * shrink", "total = total"),
    "lse in base 2": ("gl.log2(total)) * LN_2", "gl.log2(total))"),
    "natural exponentials": ("scale2 = scale * LOG2_E", "scale2 = scale"),
    "another head of k": ("head // group_size * channels", "(head // group_size + 1) % (heads // group_size) * channels"),
    "another sequence of k": ("k_row = sequence * blocks * keys", "k_row = 0"),
    "the same block of v": ("last - (step - 1) * keys", "last"),
    "k is not waited for": ("mbarrier.wait(k_full.index(stage), parity)", "pass"),
    "v is not waited for": ("mbarrier.wait(v_full.index(before), before_parity)\n        adding", "adding"),
    "v of the last step is not waited for": ("mbarrier.wait(v_full.index(stage), parity)", "pass"),
    "the wait for a free buffer is of the other parity": ("parity ^ 1", "parity"),
    "buffers are not waited for": ("mbarrier.wait(empty.index(stage), parity ^ 1)", "pass"),
    "one group is enough": ("mbarrier.init(empty.index(stage), count=2)", "mbarrier.init(empty.index(stage), count=1)"),
    "v is not given back": ("mbarrier.arrive(v_empty.index(before), count=1)", "pass"),
    "k is given back too early": (_TAKE + "\n        " + _GIVE, _GIVE + "\n        " + _TAKE),
    "q is not waited for": ("mbarrier.wait(q_full.index(group), 0)", "pass"),
    "q of the other group": ("q_buffers.index(group))", "q_buffers.index(1 - group))"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_planted_fault_is_found(name: str) -> None:
    old, new = EDITS[name]
    sources = [value.src for value in vars(attention_hopper).values() if hasattr(value, "src")]
    assert sum(source.count(old) for source in sources) == 1

    def edit(source: str) -> str:
        return source.replace(old, new)

    try:
        fault = find_fault(executed(0, edit), CPU, [Case((2, 256, 640, 2, 2, 64), True)], repeats=1)
        assert fault or explore(recorded(4, 2, edit)) == 0
    except Fault:
        pass


def recorded(blocks: int, stages: int, edit: Callable[[str], str] = str) -> Traces:
    """Of a program that goes over so many blocks, when copies are never late."""
    q, k, v = make(Case((1, TILE, blocks * TILE, 1, 1, 64), False), CPU)
    launch, _ = launched(q, k, v, -1, -1, 0.125)
    return traces(replace(launch, meta={**launch.meta, "STAGES": stages}), 0, lambda options: options - 1, edit)


@pytest.mark.parametrize(("stages", "blocks"), [(1, 4), (2, 1), (2, 2), (2, 3), (2, 6), (3, 1), (3, 2), (3, 3), (3, 7)])
def test_every_order_of_the_steps_ends_and_reads_what_it_should(stages: int, blocks: int) -> None:
    of = recorded(blocks, stages)
    for steps in of.actors[:2]:
        tiles = [tile for kind, *rest in steps if kind == "read" for _, tile in rest[0]]
        assert [tile for tile in tiles if tile[:6] == "k_desc"] == [f"k_desc {i * TILE} 0" for i in reversed(range(blocks))]
        assert [tile for tile in tiles if tile[:6] == "v_desc"] == [f"v_desc {i * TILE} 0" for i in reversed(range(blocks))]
    assert explore(of) > 100


@pytest.mark.parametrize("stages", [2, 3])
def test_the_search_finds_what_is_missing(stages: int) -> None:
    """A wait or an arrival that is left out is a fault in some order."""
    of = recorded(stages + 2, stages)
    first, second, loads = of.actors
    waits = [i for i, step in enumerate(loads) if step[0] == "wait"]
    again = [i for i in waits if loads[i][1] in {loads[j][1] for j in waits if j < i}]  # not for a buffer that is still new
    assert len(again) == 4
    for i in again:
        with pytest.raises(Fault):
            explore(Traces([first, second, without(loads, i)], of.counts))
    gives = [i for i, step in enumerate(first) if step[0] == "arrive"]
    for i in gives[:2]:  # K and V of the first block, which other blocks take the place of
        with pytest.raises(Fault, match="all wait"):
            explore(Traces([without(first, i), second, loads], of.counts))
    with pytest.raises(Fault):
        explore(Traces(of.actors, dict.fromkeys(of.counts, 1)))


def without(steps: list[tuple], i: int) -> list[tuple]:
    return steps[:i] + steps[i + 1 :]


def test_programs_are_placed_once_each_and_the_longest_rows_come_first() -> None:
    place = Machine(0, len).functions()["place_in"]
    for tiles, heads in ((1, 4), (2, 1), (3, 6), (5, 7)):
        for together in range(1, heads + 2):
            places = [place(program, tiles, heads, together) for program in range(tiles * heads)]
            assert sorted(places) == [(tile, head) for tile in range(tiles) for head in range(heads)]
            for first in range(0, heads, together):  # heads that share the cache
                tiles_of_group = [tile for tile, _ in places[first * tiles : (first + together) * tiles]]
                assert tiles_of_group == sorted(tiles_of_group, reverse=True)


@pytest.fixture(scope="module")
def assembly(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Instructions of the causal bf16 kernels, by the width of a head."""
    found: dict = {}
    for label, call, claims in attention_hopper.specimens():
        if "bfloat16" in label and "causal" in label:
            _add(found, "attention_hopper", label, 90, call, claims)
    with _pretended_gpu(Path(knobs.cache.dir) / "gate") as gpu, ThreadPoolExecutor(1) as pool:
        compiled = [pool.submit(_compile, specimen, gpu).result() for specimen in found.values()]
    attention_hopper._forward_hopper.device_caches.clear()  # made for a GPU that is not there
    assert [each.error for each in compiled] == [""] * len(HEAD_DIMS)
    texts = [
        cubin._output(cubin._code(each.kernel.asm["cubin"]), knobs.nvidia.nvdisasm.path, "--binary", "SM90a") for each in compiled
    ]
    return {specimen.label: text.splitlines() for specimen, text in zip(found.values(), texts, strict=True)}


def test_the_exponentials_are_computed_while_a_product_goes_on(assembly: dict[str, list[str]]) -> None:
    """ptxas may move them below the wait for it, and then nothing overlaps. And it may not touch what the product reads."""
    for label, lines in assembly.items():
        begins = [i for i, line in enumerate(lines) if "WARPGROUP.DEPBAR.LE gsb0, 0x1" in line]
        assert len(begins) == 2, label  # one loop for each group
        for begin in begins:
            end = next(i for i in range(begin, len(lines)) if "WARPGROUP.DEPBAR.LE gsb0, 0x0" in lines[i])
            inside = lines[begin + 1 : end]
            assert sum("MUFU.EX2" in line for line in inside) >= 64, label  # 64 x 128 scores for 128 threads
            back = next(i for i in range(begin, 0, -1) if "SYNCS.PHASECHK" in lines[i])
            going = set()
            for line in lines[back:begin]:
                if product := re.search(r"HGMMA\.64x(\d+)x16\S+ R(\d+), R(\d+), gdesc", line):
                    columns, to, of = map(int, product.groups())
                    going |= {*range(to, to + columns // 2), *range(of, of + 4)}
            assert len(going) > 32, label
            assert not [line for line in inside if going & {int(r) for r in re.findall(r"\bR(\d+)\b", line)}], label
