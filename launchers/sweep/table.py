"""How the points of a sweep do: a table that is drawn again and again on a terminal, a line per change elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from megalm.launchers.sweep.point import Point
from megalm.runfolder import read_progress

_SECONDS = 0.5  # between two drawings
_UP, _CLEAR = "\x1b[{}A", "\x1b[0J"
_SWEPT_HIDDEN = ("train.run_dir=",)


class Table:
    """`kind`: auto, table or lines. On leaving, the last state stays on the screen."""

    def __init__(self, points: Sequence[Point], kind: str = "auto") -> None:
        self.points = list(points)
        self.live = kind == "table" or (kind == "auto" and sys.stdout.isatty())
        self.names = names_of([point.overrides for point in points])
        self.said: dict[int, str] = {}
        self.drawn, self.height = 0.0, 0

    def __enter__(self) -> Table:
        self.show()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.drawn = 0.0
        self.show()

    def show(self) -> None:
        """Draw it, if it is time."""
        if not self.live:
            return self._say_changes()
        now = time.monotonic()
        if now - self.drawn < _SECONDS:
            return None
        self.drawn = now
        columns, rows = shutil.get_terminal_size()
        lines = [line[: columns - 1] for line in self._lines(rows - 2)]
        up = _UP.format(self.height) + "\r" if self.height else ""
        sys.stdout.write(up + _CLEAR + "\n".join(lines) + "\n")
        sys.stdout.flush()
        self.height = len(lines)
        return None

    def _lines(self, room: int) -> list[str]:
        """Points at work first where there is no room for all."""
        order = sorted(self.points, key=lambda point: (point.status != "running", point.number))[: max(1, room - 2)]
        lines = [f"{'point':>5}  {'status':9}  {'step':>13}  {'loss':>8}  settings"]
        lines += [self._row(point) for point in sorted(order, key=lambda point: point.number)]
        count = {status: sum(point.status == status for point in self.points) for status in _order(self.points)}
        return [*lines, ", ".join(f"{number} {status}" for status, number in count.items())]

    def _row(self, point: Point) -> str:
        progress, result = read_progress(point.folder), point.result()
        steps = f"{progress.step}/{progress.steps}" if progress else ""
        loss = result.value if result is not None else progress.loss if progress else None
        shown = f"{loss:8.4f}" if loss is not None else " " * 8
        return f"{point.number:>5}  {point.status:9}  {steps:>13}  {shown}  {self.names[self.points.index(point)]}"

    def _say_changes(self) -> None:
        for point, name in zip(self.points, self.names, strict=True):
            if point.status == self.said.get(point.number, "waiting"):
                continue
            self.said[point.number] = point.status
            result = point.result()
            value = f", {result.metric} {result.value:.4f} at step {result.step}" if result is not None else ""
            note = " before" if point.before else f", {point.note}" if point.note else ""
            print(f"point {point.number} ({name}): {point.status}{note}{value}; {point.folder}", flush=True)


def _order(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(sorted(point.status for point in points)))


def names_of(overrides: Sequence[Sequence[str]]) -> list[str]:
    """Of each point the settings in which it differs from others; all of them if it is alone."""
    shared = set(overrides[0]).intersection(*overrides[1:]) if len(overrides) > 1 else set()
    names = [[text for text in own if text not in shared and not text.startswith(_SWEPT_HIDDEN)] for own in overrides]
    return [" ".join(own) or "as it stands" for own in names]
