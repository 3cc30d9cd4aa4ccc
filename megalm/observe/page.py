"""`megalm report`: a run as one HTML file that needs nothing else, and can do nothing but be read."""

from __future__ import annotations

from itertools import pairwise
from statistics import median
from typing import Any

from megalm import __version__
from megalm.config.parallel import ParallelConfig, layout_name
from megalm.errors import ExitCode
from megalm.observe import compare, curves
from megalm.observe.folder import Run
from megalm.observe.parts import Figures, cards, heat_map, panel, stacked, table, tracks, verbatim
from megalm.observe.starts import EFFECTIVE, Start, Times, starts_of, times_of
from megalm.observe.style import POLICY, STYLE
from megalm.observe.verdict import Verdict, judge
from megalm.observe.words import clean, count, duration, moment, number, safe, short, size, told

_EVENTS, _MACHINES, _RANKS = 300, 200, 16  # rows of the tables


def render(run: Run, parent: Run | None, now: float, alive: bool | None) -> str:
    """The page. `alive`: whether the run's process is there, None if that is not known."""
    verdict, starts, figures = judge(run, now, alive), starts_of(run), Figures()
    times = times_of(run, starts, verdict.state in ("running", "finished", "pruned"))
    parts = [
        _top(run, verdict, now),
        _cards(run, starts, times),
        curves.loss(figures, run, parent, starts),
        curves.grid(figures, run, parent, starts),
        _parent(run, parent) if parent is not None else "",
        _time(figures, run, starts, times),
        _memory(run),
        _experts(figures, run, starts),
        _config(run),
        _failures(run),
        _events(run),
        _machines(run, starts),
        _foot(run, now),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{safe(run.name)}: megalm run</title>'
        f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def about(run: Run) -> str:
    """What runs, in one line, as far as the config tells."""
    c = run.config
    name, layers, width = (clean(c.get(f"model.{key}"), 40) for key in ("architecture", "num_layers", "hidden_size"))
    texts = [f"{name}, {layers} layers of {width}"] if "model.architecture" in c else []
    try:
        parallel = ParallelConfig(**{key.removeprefix("parallel."): v for key, v in c.items() if key.startswith("parallel.")})
        ranks = int(c["cluster.num_processes"])
        texts.append(f"layout {layout_name(parallel, max(1, ranks // parallel.ranks_per_sample))} on {ranks} ranks")
    except (TypeError, ValueError, KeyError, ZeroDivisionError, AttributeError, OverflowError):
        pass  # of another version, or not a config at all
    texts += [f"{count(run.tokens_per_step)} tokens per step"] if run.tokens_per_step else []
    texts += [clean(c["train.precision"], 20)] if "train.precision" in c else []
    return "; ".join(texts)


def _top(run: Run, verdict: Verdict, now: float) -> str:
    mood = {ExitCode.FINISHED: "good", ExitCode.SAVED: "fair"}.get(verdict.code, "bad")
    why = f"<p>{safe(verdict.why, 600)}</p>" if verdict.why else ""
    return (
        f'<header><div class="top"><h1>{safe(run.name)}</h1><span class="badge {mood}">{safe(verdict.state)}</span></div>'
        f'{why}<p class="quiet">{safe(about(run))}</p><p class="quiet path">{safe(str(run.folder.resolve()))}</p></header>'
    )


def _cards(run: Run, starts: list[Start], times: Times | None) -> str:
    rows = [("step", f"{run.step:,}", f"of {run.steps:,}, {run.step / run.steps:.0%}" if run.steps else "")]
    if losses := run.column("loss"):
        recent = [y for _, y in losses[-10:]]
        rows.append(("training loss", short(sum(recent) / len(recent)), f"mean of the last {len(recent)} steps"))
    if valid := run.column("valid_loss"):
        step, best = min(valid, key=lambda point: point[1])
        rows.append(("best validation", short(best), f"at step {step:,.0f}"))
    if (tokens := run.last("tokens")) is not None:
        rows.append(("tokens", count(tokens), ""))
    if speeds := run.column("tokens_per_second"):
        mfu = run.last("mfu")
        rows.append(("tokens/s", count(median(y for _, y in speeds)), f"median; MFU {mfu:.1%}" if mfu else "median"))
    if times is not None:
        rows.append(("wall time", duration(times.wall), f"since {moment(times.began, utc=True)} UTC"))
        if times.effective is not None:
            rows.append(("effective time", f"{times.effective:.1%}", "in steps that counted"))
    if starts:
        known = [max(0, a.last_step - b.first_step) for a, b in pairwise(starts) if a.last_step is not None]
        more = f"{sum(known):,} steps done again" if known and len(known) == len(starts) - 1 else ""
        rows.append(("restarts", str(len(starts) - 1), more))
    return cards(rows)


def _parent(run: Run, parent: Run) -> str:
    rows = [(key, clean(theirs), clean(mine)) for key, theirs, mine in compare.differing(run, parent)]
    same = "<p>No setting differs but the run's folder.</p>"
    settings = table(("setting", "parent", "this run"), rows, "-vv") if rows else same
    numbers = table(("", "parent", "this run", "difference"), compare.numbers(run, parent), "-nnn")
    title = f'<h2>Beside its parent</h2><p class="quiet path">{safe(str(parent.folder))}</p>'
    both = panel("<h3>Numbers</h3>", numbers) + panel("<h3>Settings that differ</h3>", settings)
    return f'{title}<div class="grid pair">{both}</div>'


def _time(figures: Figures, run: Run, starts: list[Start], times: Times | None) -> str:
    if times is None or times.wall <= 0:
        return ""
    shares = (
        ("steps that counted", times.counted, "a"),
        ("checkpoints", times.saving, "c"),
        ("other: evaluation, first steps, steps done again, waiting for a stalled rank", times.other, "p"),
        ("between two starts", times.between, "bad"),
    )
    bar = stacked([(n, t / times.wall, style, f"{duration(t)}, {t / times.wall:.1%}") for n, t, style in shares if t > 0])
    rows = []
    for start in starts[-_MACHINES:]:
        last = f"{start.last_step:,}" if start.last_step is not None else "?"
        when = (start.attempt, moment(start.began, utc=True), f"{start.first_step:,} to {last}", duration(start.seconds))
        rows.append((*when, str(start.ranks or "-"), _names(start.hosts), start.job or "-", start.ending or "goes on"))
    head = ("start", "began, UTC", "steps", "lasted", "ranks", "machines", "job", "how it ended")
    listed = panel("<h3>Starts</h3>", table(head, rows, "-tttn--w")) if rows else ""
    spent = panel("<h3>What the time went into</h3>", bar, f'<p class="quiet">{safe(EFFECTIVE, 600)}</p>')
    return f'<h2>Time</h2><div class="rows">{spent}{curves.clock(figures, run, starts, times)}{listed}</div>'


def _names(hosts: list[str]) -> str:
    return ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "") or "-"


def _memory(run: Run) -> str:
    ranks = run.memory.get("ranks")
    rows: list[tuple[float, float, dict[str, Any]]] = []
    for rank in ranks[:100_000] if isinstance(ranks, list) else []:
        if isinstance(rank, dict):
            measured, predicted = number(rank.get("measured")), number(rank.get("predicted"))
            if measured is not None and predicted is not None and measured > 0 and predicted >= 0:
                rows.append((measured, predicted, rank))
    if not rows:
        return ""
    rows.sort(key=lambda row: row[0], reverse=True)
    top = max(max(m, p) for m, p, _ in rows) * 1.02
    bars = tracks(
        (f"rank {clean(rank.get('rank'), 12)}", m / top, p / top, f"{size(m)}, predicted {size(p)} ({p / m - 1:+.1%})")
        for m, p, rank in rows[:_RANKS]
    )
    parts = rows[0][2].get("parts")
    known = [(clean(key, 40), value) for key, text in parts.items() if (value := number(text))] if isinstance(parts, dict) else []
    shares = ", ".join(f"{key} {size(value)}" for key, value in known[:12])
    step, layout = clean(run.memory.get("step"), 20), clean(run.memory.get("layout"), 60)
    text = f"Peak of step {step}, {layout}: the bar is measured, the line predicted."
    text += f" Predicted for the fullest: {shares}." if shares else ""
    text += f" The {_RANKS} fullest of {len(rows):,} ranks." if len(rows) > _RANKS else ""
    note = f'<p class="quiet">{safe(text, 900)}</p>'
    return f"<h2>Memory</h2>{panel(bars, note)}"


def _experts(figures: Figures, run: Run, starts: list[Start]) -> str:
    lines = curves.experts(figures, run, starts)
    if not run.loads and not lines:
        return ""
    title = "Experts' shares of the mean load, by layer"
    text = "As last reported. Pale: an even share; orange: more, up to twice and above; blue: less, down to none."
    shown = panel(f"<h3>{title}</h3>", heat_map(run.loads, title), f'<p class="quiet">{text}</p>') if run.loads else ""
    return f"<h2>Experts</h2>{shown}{lines}"


def _config(run: Run) -> str:
    sections: dict[str, list[tuple[str, str]]] = {}
    for key, value in run.config.items():
        section, _, name = key.rpartition(".")
        row = (name if "." not in section else key, clean(value))
        sections.setdefault(section.partition(".")[0] or "config", []).append(row)
    folded = []
    for name, rows in sections.items():
        settings = table(("setting", "value"), rows, "-v")
        folded.append(f"<details><summary>{safe(name, 60)} <span>{len(rows)} settings</span></summary>{settings}</details>")
    return f"<h2>Config</h2>{panel(*folded)}" if folded else ""


def _failures(run: Run) -> str:
    folded = [f"<details><summary>{safe(name)}</summary>{verbatim(lines)}</details>" for name, lines in run.failures]
    text = '<p class="quiet">What the agents found when ranks had died or hung, newest first.</p>'
    return f"<h2>Failures</h2>{panel(text, *folded)}" if folded else ""


def _events(run: Run) -> str:
    if not run.events:
        return ""
    rows = [(moment(e["time"], utc=True), clean(e["kind"], 30), told(e)) for e in reversed(run.events[-_EVENTS:])]
    more = f'<p class="quiet">The last {_EVENTS} of {len(run.events):,}.</p>' if len(run.events) > _EVENTS else ""
    return f"<h2>Events</h2>{panel(table(('UTC', 'event', 'what'), rows, 't-w'), more)}"


def _machines(run: Run, starts: list[Start]) -> str:
    times: dict[str, float] = {}
    taken: dict[str, int] = {}
    for start in starts:
        for host in dict.fromkeys(start.hosts):
            times[host], taken[host] = times.get(host, 0.0) + start.seconds, taken.get(host, 0) + 1
    faults: dict[str, list[str]] = {}
    for event in run.events:
        if event["kind"] in ("failed", "stalled", "excluded"):
            for name in _blamed(event):
                faults.setdefault(name, []).append(event["kind"])
    hosts = list(dict.fromkeys([*faults, *times]))
    rows = []
    for host in hosts[:_MACHINES]:
        named = ", ".join(faults.get(host, [])[:8]) or "-"
        rows.append((host, str(taken.get(host, 0)), duration(times.get(host, 0.0)), named))
    more = f'<p class="quiet">{_MACHINES} of {len(hosts):,} machines.</p>' if len(hosts) > _MACHINES else ""
    head = ("machine", "starts", "time", "named in")
    return f"<h2>Machines</h2>{panel(table(head, rows, '-nt-'), more)}" if rows else ""


def _blamed(event: dict[str, Any]) -> list[str]:
    """The machines that an event names."""
    several = [event.get("nodes"), event.get("bad_nodes")]
    names = [
        event.get("host"),
        event.get("node"),
        *(name for group in several if isinstance(group, (list, dict)) for name in group),
    ]
    return list(dict.fromkeys(clean(name, 80) for name in names[:1000] if name))


def _foot(run: Run, now: float) -> str:
    notes = "".join(f"<p>{safe(note)}</p>" for note in run.notes)
    return f"<footer>{notes}<p>Written {moment(now, utc=True)} UTC by megalm {safe(__version__)}. Times are UTC.</p></footer>"
