"""From what the nodes say of themselves to which of them are bad."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from megalm.launchers.slurm.preflight import Report

MAX_CLOCK_SECONDS = 5.0  # apart; more, and files and certificates seem to come from the future


def read_reports(lines: Iterable[str]) -> dict[str, Report]:
    """{host: report}; lines that are none, such as srun's own, are left out."""
    reports = {}
    for line in lines:
        if line.startswith("{"):
            try:
                report = Report(**json.loads(line))
            except (ValueError, TypeError):
                continue
            reports[report.host] = report
    return reports


def find_bad(nodes: Sequence[str], reports: dict[str, Report]) -> dict[str, str]:
    """{node: why}. A link that fails has two ends: blamed is a node that is silent or has two bad links, else the far one.

    A link to a node that is deaf, its port being taken, is not judged.
    """
    bad = {node: "; ".join(reports[node].problems) for node in nodes if node in reports and reports[node].problems}
    bad |= {node: "no answer" for node in nodes if node not in reports}
    links = [(node, nodes[(i + 1) % len(nodes)]) for i, node in enumerate(nodes) if node in reports and reports[node].link]
    broken = [(near, far) for near, far in links if far not in reports or not reports[far].deaf]
    ends = Counter(end for link in broken for end in link)
    for near, far in broken:
        if near not in bad and far not in bad:
            blamed = near if ends[near] > ends[far] else far
            bad[blamed] = f"link {near} -> {far}: {reports[near].link}"
    bad |= {node: why for node, why in _clocks(nodes, reports).items() if node not in bad}
    drivers = Counter(reports[node].driver for node in nodes if node in reports and reports[node].driver)
    if len(drivers) > 1:
        usual = drivers.most_common(1)[0][0]
        odd = [n for n in nodes if n in reports and reports[n].driver not in ("", usual) and n not in bad]
        bad |= {node: f"driver {reports[node].driver}, the others have {usual}" for node in odd}
    return {node: bad[node] for node in nodes if node in bad}


def _clocks(nodes: Sequence[str], reports: dict[str, Report]) -> dict[str, str]:
    """Clocks along the ring, against the one in the middle."""
    ahead, clocks = 0.0, {}
    for node in nodes:
        if node not in reports:
            break
        clocks[node] = ahead
        ahead += reports[node].clock
    middle = sorted(clocks.values())[len(clocks) // 2] if clocks else 0.0
    far = {node: clock - middle for node, clock in clocks.items() if abs(clock - middle) > MAX_CLOCK_SECONDS}
    return {node: f"its clock is {seconds:+.0f} s off" for node, seconds in far.items()}
