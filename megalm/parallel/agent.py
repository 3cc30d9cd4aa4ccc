"""The agent: one small process per node that starts the run's ranks, watches them, and starts them again. No torch.

It sees two things of a rank: its exit code, and its heartbeat (heartbeat_file.py). When a rank dies or hangs, every rank
writes its stacks, a report names the one that the others wait for, all are killed, and the run starts again in place from
its last checkpoint, with another rendezvous. After `max_restarts` such starts in a row without a new checkpoint it gives up.

Where a run has several nodes, node 0's agent leads (`Lead`), and the others do as it says (`follow`; agent_link.py). What the
ranks themselves agree on (to stop, by a reduction after every step) needs no word between agents: each tells its own.
"""

from __future__ import annotations

import itertools
import os
import select
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megalm.config.cluster import ClusterConfig
from megalm.config.machine import processes
from megalm.config.run import RunConfig
from megalm.errors import ConfigError, ExitCode, MegalmError, Problem, RunError
from megalm.parallel import verdict
from megalm.parallel.agent_link import LOST_SECONDS, Peers, Wire
from megalm.parallel.signals import StopRequest
from megalm.parallel.squad import GAP_SECONDS, LOOK_SECONDS, Ranks, Squad
from megalm.parallel.verdict import Patience, RankStatus
from megalm.parallel.workers import Starter, free_port, make_folder, next_start, start_process
from megalm.runfolder import note_event, read_progress

_POLL_SECONDS = 0.1  # each costs the machine a fraction of a millisecond, which a rank may miss
_ASK_SECONDS = 1.0  # between two requests to stop: a rank that is still importing hears none
_NOTE_SECONDS = 1.0  # how long to wait for other workers' notes, so that the cause is shown and not its echo
_STACK_SECONDS = 0.5  # for the stacks to be written
_DEATH_SECONDS = 15.0  # for all nodes to say that their ranks are gone
_PORT_SECONDS = 30.0  # for a port to be free again


@dataclass(frozen=True)
class Policy:
    """What the lead goes by."""

    run_dir: Path
    max_restarts: int = 0
    patience: Patience = field(default_factory=Patience)
    rendezvous_seconds: float = 300.0
    port: int = 0  # of the ranks' rendezvous; 0: any free one, another for each start
    job_attempt: str = "0"  # SLURM's restart


class Lead:
    """Node 0's agent, which on one machine is the only one."""

    def __init__(self, squad: Squad, policy: Policy, peers: Peers, stop: StopRequest, address: str = "127.0.0.1"):
        self.squad, self.policy, self.peers, self.stop, self.address = squad, policy, peers, stop, address
        self.has_trained = False  # in some start: that it is refused now can be no mistake in the command

    def run(self) -> ExitCode:
        """FINISHED or SAVED. Raises MegalmError, with the exit code that is due, if the run cannot be brought there."""
        code = int(ExitCode.FAILED)
        try:
            arrived = self.peers.gather(self.policy.rendezvous_seconds, self.stop)
            code = self._run() if arrived else ExitCode.SAVED
            return ExitCode(code)
        except MegalmError as error:
            code = error.exit_code
            raise
        finally:
            self.peers.tell({"end": code})
            self.peers.close()

    def _run(self) -> ExitCode:
        in_a_row, saved_step = 0, self._saved_step()
        for number in itertools.count():
            attempt = f"{self.policy.job_attempt}.{number}"
            outcome = self._attempt(attempt)
            if isinstance(outcome, ExitCode):
                return outcome
            saved_step, before = self._saved_step(), saved_step
            in_a_row = 0 if saved_step > before else in_a_row
            hopeless = outcome.exit_code == ExitCode.HOPELESS
            refused = outcome.exit_code == ExitCode.REFUSED and not self.has_trained
            final = hopeless or refused or self.stop.signal or self.peers.asked
            if final or self.peers.lost() or in_a_row >= self.policy.max_restarts:
                if self.policy.max_restarts and not final:
                    self._note("gave_up", attempt=attempt, restarts_in_a_row=in_a_row, saved_step=saved_step)
                raise outcome
            in_a_row += 1
            self._note("restarted", attempt=f"{self.policy.job_attempt}.{number + 1}", in_a_row=in_a_row, saved_step=saved_step)
            _say(f"{outcome}\nrestart {in_a_row} of {self.policy.max_restarts}: {next_start(self.policy.run_dir)}")
        raise AssertionError("count() has no end")

    def _attempt(self, attempt: str) -> ExitCode | MegalmError:
        """Start all ranks, and watch them to their end. None is left afterwards."""
        try:
            port = self._port(attempt)
        except RunError as error:
            self._note("failed", attempt=attempt, reason="no port", message=error.problems[0].rule)
            return error
        self.peers.tell({"start": attempt, "address": self.address, "port": port})
        ranks = Ranks(self.squad, attempt, self.address, port)
        try:
            what, statuses = self._watch(ranks)
            if what == "ended":
                return verdict.exit_code(statuses)
            if what == "stopped":
                return ExitCode.SAVED
            return self._explain(what, ranks, attempt)
        finally:
            self.peers.tell({"kill": True})
            ranks.kill()
            self._wait_for_death()

    def _port(self, attempt: str) -> int:
        """For the ranks' rendezvous. One that the user named was free once: later starts wait for it. Raises RunError then."""
        deadline = time.monotonic() + _PORT_SECONDS
        while True:
            try:
                return free_port(self.policy.port, self.address)
            except ConfigError as error:
                if attempt == "0.0":
                    raise
                if self.stop.signal or time.monotonic() > deadline:
                    raise RunError(*error.problems) from error
                self.peers.look(0.2)

    def _watch(self, ranks: Ranks) -> tuple[str, list[RankStatus]]:
        """Until something is to be done: what judge says, or lost."""
        looked = asked = 0.0
        ran, before = time.monotonic(), list[int | None]()
        while True:
            heard = self.peers.look(_POLL_SECONDS)
            now, codes = time.monotonic(), ranks.codes()
            if now - ran > GAP_SECONDS:
                self.peers.suspended(now - ran)
            ran = now
            if self.stop.signal and now - asked > _ASK_SECONDS:
                asked = now
                ranks.ask_to_stop()
            if self.peers.lost():
                return "lost", ranks.statuses()
            if codes == before and not heard and now - looked < LOOK_SECONDS:
                continue
            looked, before = now, codes
            statuses = ranks.statuses() + self.peers.statuses()
            self.has_trained |= any(status.pulse.phase == "train" for status in statuses)
            what = verdict.judge(statuses, self.policy.patience, bool(self.stop.signal) or self.peers.asked)
            if what == "ended" and not self.peers.all_told():
                continue
            if what != "running":
                return what, statuses

    def _explain(self, what: str, ranks: Ranks, attempt: str) -> MegalmError:
        """Gather what can be known of a start that went wrong: notes, stacks, the report; the error that says it."""
        before = ranks.statuses(fresh=True) + self.peers.statuses()
        self.peers.tell({"stacks": True})  # at once: where a rank has died, the others' collectives soon fail
        ranks.dump_stacks()
        self._look(_STACK_SECONDS if what == "stalled" else _NOTE_SECONDS)
        blamed = before if what == "stalled" else ranks.statuses(fresh=True) + self.peers.statuses()
        path, again = self.squad.log_dir / f"report-{attempt}.txt", next_start(self.policy.run_dir)
        error: MegalmError
        details: dict[str, object]
        if what == "lost":
            hosts = ", ".join(self.peers.lost())
            rule = f"the agent there must give a sign of life every {LOST_SECONDS:g} s; all ranks were ended"
            error, guilty = RunError(Problem("node", hosts, rule, "", f"see {path}; the same command again {again}")), None
            details = {"reason": "lost", "host": hosts}
        elif what == "stalled":
            error, guilty = verdict.stall(blamed, self.policy.patience, str(path), again)
            details = {"reason": "stopped" if guilty.state == "T" else "stalled"}
        else:
            error, guilty = verdict.failure(blamed, str(self.squad.log_dir), again)
            details = {"reason": error.kind if guilty.note else str(error.problems[0].value)}
            if guilty.note:
                sys.stderr.write(guilty.note["traceback"])  # empty for a user's mistake
        if guilty is not None:
            details |= {"rank": guilty.rank, "host": guilty.host}
        names = [status.rank for status in verdict.culprits(blamed)] if what == "stalled" else [guilty.rank] if guilty else []
        with suppress(OSError):
            path.write_text(verdict.report(str(error), blamed, names), encoding="utf-8")
        message = error.problems[0].rule[:500]
        if error.exit_code != ExitCode.REFUSED or self.has_trained:
            self._note("stalled" if what == "stalled" else "failed", message=message, attempt=attempt, **details)
        return error

    def _wait_for_death(self) -> None:
        """Until every node has said that its ranks are gone, lest two starts write to one folder."""
        deadline = time.monotonic() + _DEATH_SECONDS
        while not self.peers.lost() and time.monotonic() < deadline:
            if self.peers.all_told() and all(status.code is not None for status in self.peers.statuses()):
                return
            self.peers.look(_POLL_SECONDS)

    def _look(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.peers.look(left)

    def _saved_step(self) -> int:
        progress = read_progress(self.policy.run_dir)
        return progress.saved_step if progress else 0

    def _note(self, kind: str, **details: object) -> None:
        with suppress(OSError):
            note_event(self.policy.run_dir, kind, **details)


def follow(squad: Squad, wire: Wire, stop: StopRequest) -> ExitCode:
    """Another node's agent: do as the lead says, until it says the end. Raises RunError if it is gone. No rank is left."""
    ranks: Ranks | None = None
    attempt, before, told, asked, ran = "", list[int | None](), 0.0, 0.0, time.monotonic()
    try:
        while True:
            select.select([wire.socket] if wire.open else [], [], [], _POLL_SECONDS)
            now = time.monotonic()
            if now - ran > GAP_SECONDS:
                wire.heard += now - ran
            ran = now
            for message in wire.receive():
                if "end" in message:
                    return ExitCode(message["end"])
                if "start" in message:
                    attempt, before = message["start"], []
                    ranks = Ranks(squad, attempt, message["address"], message["port"])
                elif "stacks" in message and ranks:
                    ranks.dump_stacks()
                elif "kill" in message and ranks:
                    ranks.kill()
            if not wire.open or now - wire.heard > LOST_SECONDS:
                rule = f"node 0's agent must give a sign of life every {LOST_SECONDS:g} s; the ranks of this node were ended"
                raise RunError(Problem("--head", None, rule, "", "see node 0's log"))
            if ranks is None:
                continue
            if stop.signal and now - asked > _ASK_SECONDS:
                asked = now
                ranks.ask_to_stop()
            codes = ranks.codes()
            if codes != before or now - told > LOOK_SECONDS:
                plain = [status.to_plain() for status in ranks.statuses(fresh=codes != before)]  # a dead rank's last word
                before, told = codes, now
                wire.send({"ranks": plain, "attempt": attempt, "asked": bool(stop.signal)})
    finally:
        if ranks is not None:
            ranks.kill()
        wire.close()


def start_workers(
    module: str,
    arguments: Sequence[str],
    config: RunConfig,
    quiet: bool = False,
    start: Starter = start_process,
    stop: StopRequest | None = None,
) -> ExitCode:
    """Run `python -m module arguments...` as the ranks of `config` on this machine, supervised: FINISHED, or SAVED.

    Raises RunError, with the exit code that is due, when one fails and may not be started again. `quiet` sends rank 0's
    console to its log file too. `stop` of a caller who listens already.
    """
    if stop is None:
        with StopRequest() as stop:
            return start_workers(module, arguments, config, quiet, start, stop)
    num_processes, log_dir = processes(config), Path(config.train.run_dir) / "logs"
    make_folder(log_dir)
    environ = worker_environ(config.cluster, num_processes, "127.0.0.1")
    squad = Squad(module, arguments, log_dir, environ, 0, num_processes, num_processes, quiet, start)
    return Lead(squad, policy_of(config), Peers(), stop).run()


def worker_environ(config: ClusterConfig, ranks_here: int, address: str) -> dict[str, str]:
    """What every worker of this node gets: this process's own, and as many threads as are due (cluster.threads)."""
    share = max(1, len(os.sched_getaffinity(0)) // ranks_here)
    threads = config.threads or os.environ.get("OMP_NUM_THREADS") or share
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore::FutureWarning"}
    environ.pop("MEGALM_TOKEN", None)  # the agents' alone
    if address.startswith("127."):
        environ["GLOO_SOCKET_IFNAME"] = "lo"
    return environ


def policy_of(config: RunConfig, job_attempt: str = "0") -> Policy:
    """As the config says."""
    cluster = config.cluster
    slow = float(cluster.timeout_seconds)
    patience = Patience(cluster.stall_seconds, cluster.rendezvous_seconds + slow, slow)
    run_dir = Path(config.train.run_dir)
    return Policy(run_dir, cluster.max_restarts, patience, cluster.rendezvous_seconds, cluster.port, job_attempt)


def _say(text: str) -> None:
    print(f"agent: {text}", file=sys.stderr, flush=True)
