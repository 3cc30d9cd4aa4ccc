"""`train.ledger_step=N`: every collective of step N, counted on every rank and held against the formulae."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalm.config.parallel import layout_name
from megalm.log import log
from megalm.parallel.ledger import Ledger
from megalm.parallel.volume import Count, Volume, group_sizes, is_covered, wire_bytes
from megalm.train.rank_report import gather_report
from megalm.train.traffic import forecast_volume
from megalm.train.trainer import Hook, StepResult, Trainer

FILE = "ledger.json"
Row = dict[str, Any]


class Counting(Hook):
    """Around step `ledger_step`. It stands first among the hooks, so that what the others send is not counted."""

    def __init__(self) -> None:
        self.ledger: Ledger | None = None

    def on_start(self, trainer: Trainer) -> None:
        wanted, step = trainer.config.train.ledger_step, trainer.state.step
        if 0 < wanted <= step:
            log(f"no ledger: this run goes on after step {step}, and train.ledger_step is {wanted}")

    def before_step(self, trainer: Trainer) -> None:
        if trainer.state.step + 1 == trainer.config.train.ledger_step:
            self.ledger = Ledger(trainer.topology)
            self.ledger.__enter__()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if self.ledger is not None:
            volume = self._stop().volume()
            _report(trainer, volume)

    def on_end(self, trainer: Trainer) -> None:
        if self.ledger is not None:  # the step broke off
            self._stop()

    def _stop(self) -> Ledger:
        ledger, self.ledger = self.ledger, None
        assert ledger is not None
        ledger.__exit__(None, None, None)
        return ledger


def _report(trainer: Trainer, volume: Volume) -> None:
    """Every rank's rows to rank 0, which writes them and shows those of the rank that sends most. Collective."""
    topology, config = trainer.topology, trainer.config
    schedule = trainer.job.executor.schedule
    sizes, expected = group_sizes(config, schedule), None
    if is_covered(config):
        expected = forecast_volume(config, schedule, topology.pipeline.rank)
    mine = {"rank": topology.rank, "pipeline": topology.pipeline.rank, "rows": compare(volume, expected, sizes)}
    gathered = gather_report(trainer, FILE, mine)
    if not gathered:
        return
    layout = layout_name(config.parallel, topology.batch.size)
    busiest = max(gathered, key=lambda r: sum(row["wire_bytes"] for row in r["rows"]))
    log(f"step {trainer.state.step:>6}  what rank {busiest['rank']} of {len(gathered)} sent in this step, layout {layout}")
    for line in table(busiest["rows"]):
        log(line)
    equal = sum(all(row["equal"] for row in r["rows"]) for r in gathered)
    verdict = "no formula for this layout" if expected is None else f"equal to the formulae on {equal} of {len(gathered)} ranks"
    log(f"{verdict}; all ranks: {Path(config.train.run_dir) / FILE}")


def compare(volume: Volume, expected: Volume | None, sizes: dict[str, int]) -> list[Row]:
    """One row per group and operation that was called or should have been; `equal` is None without formulae.

    Where the bytes depend on what the router chose (`exact` is false), only the calls must be equal.
    """
    rows = []
    for group, operation in sorted(volume.keys() | (expected or {}).keys()):
        counted = volume.get((group, operation), Count(0, 0))
        row: Row = {"group": group, "operation": operation, "calls": counted.calls, "bytes": counted.bytes}
        row["wire_bytes"] = round(wire_bytes(operation, counted.bytes, sizes.get(group, 2)))
        formula = None if expected is None else expected.get((group, operation), Count(0, 0))
        row |= {"formula_calls": formula and formula.calls, "formula_bytes": formula and formula.bytes}
        if formula is not None:
            row["exact"] = formula.exact
        rows.append(row | {"equal": formula and counted[: 2 if formula.exact else 1] == formula[: 2 if formula.exact else 1]})
    return rows


def table(rows: list[Row]) -> list[str]:
    """The rows as text; MB are 10^6 bytes. x: times what an even choice of experts would send."""
    lines = [f"{'group':<11}{'operation':<16}{'calls':>8}{'formula':>9}{'MB':>13}{'formula':>13}{'MB on the wire':>16}"]
    for row in rows:
        formula = (f"{'-':>9}", f"{'-':>13}") if row["equal"] is None else (
            f"{row['formula_calls']:>9}", f"{row['formula_bytes'] / 1e6:>13.6f}"
        )  # fmt: skip
        mark = "" if row.get("exact", True) else f"   x {row['bytes'] / (row['formula_bytes'] or 1):.3f} of even"
        mark += "   DIFFERS" if row["equal"] is False else ""
        lines.append(
            f"{row['group']:<11}{row['operation']:<16}{row['calls']:>8}{formula[0]}{row['bytes'] / 1e6:>13.6f}{formula[1]}"
            f"{row['wire_bytes'] / 1e6:>16.6f}{mark}"
        )
    return lines
