"""All ranks meet in the store before the process group is made: who is missing, and whose config differs, is said by name.

    every rank      arrived/R = ""                    it is here
    rank 0          digest, settings                  of its config
    other ranks     differs/R = {key: [rank 0's value, its own]} of what differs; empty when the digests are equal
    rank 0          verdict = {"missing": [ranks], "differs": {rank: {key: [value, value]}}}
    every rank      read/R = ""                       rank 0, whose process may hold the store, leaves last

Without this, a rank that never starts is a time-out of torch that names nobody, and ranks with two configs hang in a
collective, or train on with different numbers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from megalm.errors import ConfigError, MegalmError, Problem, RunError

_FAREWELL_SECONDS = 5.0  # how long rank 0 waits for the others to read bad news
_MARGIN_SECONDS = 5.0  # the others wait longer than rank 0, whose verdict names the missing
_KEY = "cluster.rendezvous_seconds"


def meet(store: dist.Store, rank: int, world_size: int, settings: Mapping[str, Any], seconds: float) -> None:
    """Return when all ranks are there with equal settings {key: value}.

    Raises RunError on every rank that is there, naming those that have not arrived within `seconds`; ConfigError naming
    the keys that differ, with their values and ranks.
    """
    text = json.dumps(settings, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    try:
        store.set(f"arrived/{rank}", "")
        if rank == 0:
            store.set("settings", text)
            store.set("digest", digest)
            verdict = _judge(store, world_size, seconds)
            store.set("verdict", json.dumps(verdict))
        else:
            verdict = _listen(store, rank, world_size, json.loads(text), digest, seconds)
    except dist.DistError as error:
        raise _lost(str(error)) from error
    problem = _explain(verdict, world_size, seconds)
    if problem is not None:
        _take_leave(store, rank, [r for r in range(1, world_size) if r not in verdict["missing"]])
        raise problem


def _judge(store: dist.Store, world_size: int, seconds: float) -> dict[str, Any]:
    """On rank 0: wait for all, and collect what differs."""
    missing = _missing(store, [f"arrived/{r}" for r in range(world_size)], seconds)
    if missing:
        return {"missing": missing, "differs": {}}
    keys = [f"differs/{r}" for r in range(1, world_size)]
    late = _missing(store, keys, seconds)
    answers = {r: json.loads(store.get(f"differs/{r}")) for r in range(1, world_size) if r - 1 not in late}
    return {"missing": [place + 1 for place in late], "differs": {r: answer for r, answer in answers.items() if answer}}


def _listen(
    store: dist.Store, rank: int, world_size: int, mine: dict[str, Any], digest: str, seconds: float
) -> dict[str, Any]:
    """On the other ranks: compare with rank 0's config, tell, and wait for the verdict."""
    patience = seconds + _MARGIN_SECONDS
    if not _missing(store, ["digest"], patience):
        differs = {}
        if store.get("digest").decode() != digest:
            theirs = json.loads(store.get("settings"))
            keys = [*theirs, *(key for key in mine if key not in theirs)]
            differs = {key: [theirs.get(key), mine.get(key)] for key in keys if mine.get(key) != theirs.get(key)}
        store.set(f"differs/{rank}", json.dumps(differs))
        if not _missing(store, ["verdict"], patience):
            return json.loads(store.get("verdict"))
    missing = _missing(store, [f"arrived/{r}" for r in range(world_size)], 0.0)
    return {"missing": missing or [0], "differs": {}}  # rank 0 came, and went without a word


def _missing(store: dist.Store, keys: Sequence[str], seconds: float) -> list[int]:
    """Wait until all keys are set; the places of those that are not after `seconds`."""
    deadline, pause = time.monotonic() + seconds, 0.001
    while not store.check(list(keys)):
        if time.monotonic() >= deadline:
            return [place for place, key in enumerate(keys) if not store.check([key])]
        time.sleep(pause)
        pause = min(0.1, 2 * pause)
    return []


def _explain(verdict: dict[str, Any], world_size: int, seconds: float) -> MegalmError | None:
    """The error that every rank raises; None if all is well."""
    if verdict["missing"]:
        ranks = verdict["missing"]
        rule = f"rank{'s' * (len(ranks) > 1)} {spans(ranks)} of {world_size} did not arrive within {seconds:g} s"
        fix = f"see in their logs why they did not start; machines that start slowly need a larger {_KEY}"
        return RunError(Problem(_KEY, seconds, rule, "", fix))
    if not verdict["differs"]:
        return None
    problems = []
    differs: dict[str, dict[str, list]] = verdict["differs"]  # json has made the ranks texts
    for key in dict.fromkeys(key for answer in differs.values() for key in answer):
        first, ranks_of = "", dict[str, list[int]]()
        for rank, answer in differs.items():
            if key in answer:
                first = str(answer[key][0])
                ranks_of.setdefault(str(answer[key][1]), []).append(int(rank))
        others = "".join(f", {value} on rank{'s' * (len(ranks) > 1)} {spans(ranks)}" for value, ranks in ranks_of.items())
        rule = "all ranks must run with one config"
        fix = "start every rank with the same command, and with the same yaml files where it names some"
        problems.append(Problem(key, f"{first} on rank 0{others}", rule, "", fix))
    return ConfigError(*problems)


def _take_leave(store: dist.Store, rank: int, others: Sequence[int]) -> None:
    """Rank 0 may hold the store: it stays until the others have read its verdict."""
    try:
        store.set(f"read/{rank}", "")
        if rank == 0:
            _missing(store, [f"read/{r}" for r in others], _FAREWELL_SECONDS)
    except dist.DistError:
        pass  # gone already: what there was to say is known here


def _lost(what: str) -> RunError:
    rule = f"rank 0 left during the rendezvous ({what.splitlines()[0]})"
    return RunError(Problem("rendezvous", None, rule, "", "see in rank 0's log why it ended"))


def spans(ranks: Sequence[int]) -> str:
    """Numbers in short: 1, 3-6, 9."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
