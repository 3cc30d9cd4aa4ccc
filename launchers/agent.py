"""What a job starts once per node: the agent of the node's ranks (megalm.parallel.agent). Imports no torch.

    MEGALM_TOKEN=... python -m megalm.launchers.agent --nodes 2 --node 0 --head 10.0.0.1 --port 21234 \\
        --ranks-per-node 8 --log-dir RUN_DIR/logs/123.0 -- pretrain model=tiny ...

Exits with the code that is due for the whole run, the same on every node.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from megalm.errors import ConfigError, ExitCode, MegalmError, Problem
from megalm.parallel.signals import StopRequest

SUPERVISED = ("pretrain",)  # verbs whose processes are the ranks of a run


def main() -> None:
    """Supervise this node's ranks to their end."""
    from megalm.launchers.app import fail

    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # whoever asks a whole step for its stacks means the ranks, once there are any
    own, verb = split(sys.argv[1:])
    options = _options(own)
    with StopRequest() as stop:
        try:
            code = int(run(options, verb, stop))
        except MegalmError as error:
            fail(error)
        except KeyboardInterrupt:
            code = 130
        stop.ignore()
        sys.stdout.flush()
        os._exit(code)  # with the signals still ignored: a late one must not change the code


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The agent's own arguments, and the verb with its own, which follow a `--`."""
    place = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:place]), list(arguments[place + 1 :])


def run(options: argparse.Namespace, verb: Sequence[str], stop: StopRequest) -> ExitCode:
    """Node 0 leads, the others follow. Raises MegalmError."""
    from megalm.launchers.compose import inspect, parse
    from megalm.parallel.agent import Lead, follow, policy_of, worker_environ
    from megalm.parallel.agent_link import Peers, connect
    from megalm.parallel.squad import Squad, passing_on_dumps
    from megalm.parallel.workers import make_folder, this_host
    from megalm.runfolder import finished_step

    if not verb or verb[0] not in SUPERVISED:
        rule = "the verb whose ranks are to be started, after a --"
        raise ConfigError(Problem("agent", " ".join(verb[:1]), rule, ", ".join(SUPERVISED), "... -- pretrain model=tiny"))
    here, world_size = options.ranks_per_node, options.nodes * options.ranks_per_node
    os.environ.update(RANK=str(options.node * here), WORLD_SIZE=str(world_size))  # the rules look at the world size
    config, problems = inspect(parse(verb[0], list(verb[1:])))
    if problems:
        raise ConfigError(*problems)
    if finished_step(Path(config.train.run_dir), config.train.steps, config.train.patience) is not None:
        print(f"{config.train.run_dir} is finished; nothing to do", flush=True)
        return ExitCode.FINISHED
    log_dir = Path(options.log_dir)
    make_folder(log_dir)
    environ = worker_environ(config.cluster, here, options.head)
    module, first, start = f"megalm.launchers.{verb[0]}", options.node * here, passing_on_dumps()
    squad = Squad(module, verb[1:], log_dir, environ, first, here, world_size, start=start)
    token, seconds = os.environ.get("MEGALM_TOKEN", ""), float(config.cluster.rendezvous_seconds)
    if options.nodes > 1 and not token:
        raise ConfigError(Problem("MEGALM_TOKEN", None, "agents of several nodes need a secret that they share"))
    if options.node:
        return follow(squad, connect(options.head, options.port, options.node, this_host(), token, seconds), stop)
    policy = policy_of(config, os.environ.get("SLURM_RESTART_COUNT") or "0")
    return Lead(squad, policy, Peers(options.nodes, options.head, options.port, token), stop, options.head).run()


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megalm.launchers.agent", description="The agent of one node's ranks.")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the run")
    parser.add_argument("--node", type=int, default=0, help="which one this is, from 0")
    parser.add_argument("--head", default="127.0.0.1", help="address by which the nodes know node 0")
    parser.add_argument("--port", type=int, default=0, help="of node 0's agent")
    parser.add_argument("--ranks-per-node", type=int, required=True, help="ranks to start here")
    parser.add_argument("--log-dir", required=True, help="folder for logs, notes, stacks and reports")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
