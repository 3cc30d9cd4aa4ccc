"""Schedules that split the backward: the next rank waits for gradients of inputs only, and gradients of weights fill gaps.

Each rank's list is written as a pattern, a text of actions without microbatches (`F1 I1 W1`: kind, then chunk), because
every kind on every chunk goes through the microbatches in order. The published patterns need a least number of
microbatches. With fewer, the pattern of that least number is used and the missing microbatches are left out, which is
legal whenever the whole is: no action of one microbatch needs one of another.
"""

from __future__ import annotations

from collections import defaultdict

from megalm.parallel.actions import INPUT, LOOP, V_SHAPE, WEIGHT, Action, Placement, Schedule, stages_of


def zbh1(ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """ZB-H1 (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.3): 1F1B whose weight gradients come later.

    Rank r puts off r of them, so that every rank holds as many activations as rank 0 of 1F1B: `ranks`.
    """
    assert chunks == 1, "zbh1 has one chunk per rank"
    number = max(microbatches, ranks)
    patterns = []
    for r in range(ranks):
        steady = number - (ranks - 1 - r)
        patterns.append(
            "F0 " * (ranks - 1 - r)
            + "F0 I0 " * min(r, steady)
            + "F0 I0 W0 " * (steady - min(r, steady))
            + "I0 W0 " * (ranks - 1 - r)
            + "W0 " * min(r, steady)
        )
    return _write_out(patterns, microbatches, 1, LOOP, [ranks] * ranks)


def zbv(ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """ZB-V (Qi et al. 2023, section 6): down the ranks and back, no idle time inside a rank when F, I and W take as long.

    Holds at most 2 x `ranks` chunks, the memory of 1F1B. Published for at least 2 x `ranks` - 1 microbatches.
    """
    assert chunks == 2, "zbv has two chunks per rank"
    number = max(microbatches, 2 * ranks - 1)
    patterns = []
    for r in range(ranks):
        behind = ranks - r  # ranks from here to the turn
        patterns.append(
            "F0 " * (2 * behind - 1)
            + "F1 F0 " * r
            + "F1 I1 W1 " * behind
            + "F0 I0 W0 F1 I1 W1 " * (number - ranks - behind + 1)
            + "I0 W0 F1 I1 W1 " * (behind - 1)
            + "I0 I1 " * r
            + "I0 W0 " * behind
            + "W1 " * r
            + "W0 " * r
        )
    return _write_out(patterns, microbatches, 2, V_SHAPE, [2 * ranks] * ranks)


def dualpipev(ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """DualPipeV (DeepSeek-AI 2025; DualPipe: arXiv 2412.19437, cut in half): forward and backward go in pairs.

    A pair is a forward of one chunk and the backward of the other, of different microbatches: its parts are independent,
    so that communication of one can hide behind the other. Here they run in sequence. Weight gradients are put off
    only while the pipeline fills and drains. Published for at least 2 x `ranks` microbatches.
    """
    assert chunks == 2, "dualpipev has two chunks per rank"
    number = max(microbatches, 2 * ranks)
    patterns = []
    for r in range(ranks):
        behind = ranks - r - 1
        whole = (r + 1) // 2  # pairs of backwards at the end before weight gradients are put off
        odd = (r + 1) % 2  # and one more half pair
        patterns.append(
            "F0 " * (2 * behind)
            + "F0 F1 " * (r + 1)
            + "I1 W F1 " * behind
            + "F0 B1 F1 B0 " * (number - 2 * ranks + r + 1)
            + "B1 F1 B0 " * behind
            + "B1 B0 " * whole
            + "B1 I0 " * odd
            + "I1 I0 " * (r + 1 - whole - odd)
            + "W I0 " * behind
            + "W " * (r + 1)
        )
    return _write_out(patterns, microbatches, 2, V_SHAPE, [2 * ranks + 1] * ranks)


def _write_out(patterns: list[str], microbatches: int, chunks: int, placement: Placement, bounds: list[int]) -> Schedule:
    """Number the microbatches of every rank's pattern. A bare W is the oldest weight gradient still to do."""
    ranks = len(patterns)
    lists = []
    for rank, pattern in enumerate(patterns):
        stages = stages_of(rank, ranks, chunks, placement)
        counts: defaultdict[tuple[str, int], int] = defaultdict(int)
        waiting: list[Action] = []
        actions = []
        for word in pattern.split():
            if word == WEIGHT:
                actions.append(waiting.pop(0))
                continue
            kind, stage = word[0], stages[int(word[1])]
            key = (INPUT if kind == "B" else kind, stage)
            microbatch = counts[key]
            counts[key] += 1
            actions.append(Action(kind, stage, microbatch))
            if kind == INPUT:
                waiting.append(Action(WEIGHT, stage, microbatch))
        lists.append(tuple(a for a in actions if a.microbatch < microbatches))
    held = tuple(min(bound, chunks * microbatches) for bound in bounds)
    return Schedule(ranks, chunks, microbatches, tuple(lists), placement, held)
