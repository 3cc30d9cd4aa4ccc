"""What srun starts on a node: sets what only the node itself knows, starts a rank or the agent, passes signals on.

    python -m megalm.launchers.slurm.task (rank|agent|plain) --head HOST --port P --nodes a,b --ranks R --log-dir D
                                          -- VERB ARGUMENTS...

SLURM signals srun's own task only where processes are tracked by cgroups, and all of its descendants elsewhere. This
process is srun's task: it passes USR1, USR2, TERM and INT on (one that comes twice does no harm), so both are alike. It
leaves a note of how the rank ended, because srun's exit code is the largest of all tasks: that of a rank which was killed
after another had said why it failed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path

from megalm.errors import ExitCode
from megalm.parallel.workers import be_worker

PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


def main() -> None:
    """Ends with the code of what it started; with 0 instead of 75, for srun would end the other nodes' tasks at once."""
    for number in PASSED_ON:  # none may end this process before it can pass them on
        signal.signal(number, signal.SIG_IGN)
    at = sys.argv.index("--")
    options, verb = _options(sys.argv[1:at]), sys.argv[at + 1 :]
    node, task = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_PROCID"])
    environ = dict(os.environ)
    prepare_environment(environ, options.nodes.split(","), node, options.ranks)
    environ["MEGALM_ATTEMPT"] = f"{environ.get('SLURM_RESTART_COUNT', '0')}.0"
    if options.mode == "rank":
        environ |= {"RANK": str(task), "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"], "LOCAL_RANK": environ["SLURM_LOCALID"]}
        environ |= {"MASTER_ADDR": options.head, "MASTER_PORT": str(options.port), "MEGALM_LAUNCHER": options.log_dir}
    own_log = Path(options.log_dir, f"rank-{task}.log") if options.mode == "rank" and task else None  # rank 0: the console
    code = start(command(options, node, verb), environ, own_log)
    note = {"task": task, "host": socket.gethostname(), "code": code, "time": time.time(), "step": environ["SLURM_STEP_ID"]}
    path = Path(options.log_dir, f"exit-{task}.json")
    with suppress(OSError):  # on a full disk the code alone must do: a failure here would end the others while they save
        path.with_suffix(".tmp").write_text(json.dumps(note) + "\n", encoding="utf-8")
        path.with_suffix(".tmp").replace(path)
    sys.exit(0 if code == ExitCode.SAVED else code if code >= 0 else 128 - code)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megalm.launchers.slurm.task")
    parser.add_argument("mode", choices=("rank", "agent", "plain"))
    parser.add_argument("--head", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--nodes", required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--log-dir", required=True)
    return parser.parse_args(arguments)


def command(options: argparse.Namespace, node: int, verb: Sequence[str]) -> list[str]:
    """What to start."""
    if options.mode != "agent":
        return [sys.executable, "-m", f"megalm.launchers.{verb[0]}", *verb[1:]]
    given = {
        "nodes": len(options.nodes.split(",")), "node": node, "head": options.head, "port": options.port,
        "ranks-per-node": options.ranks, "log-dir": options.log_dir,
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "megalm.launchers.agent", *words, "--", *verb]


def start(words: Sequence[str], environ: dict[str, str], log: Path | None) -> int:
    """Start, pass signals on, wait. The exit code; -N for signal N. `log`: where its output goes instead of to ours."""
    file = open(log, "a", encoding="utf-8") if log else None  # noqa: SIM115  the child's from now on
    if file:
        file.write("--- started\n")
        file.flush()
    child = subprocess.Popen(
        words, env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file, preexec_fn=_in_child
    )
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: child.send_signal(number))
    return child.wait()


def _in_child() -> None:
    """End with this task. USR1 and USR2 stay ignored until the program listens to them; TERM and INT work at once."""
    be_worker()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def prepare_environment(environ: MutableMapping[str, str], nodes: Sequence[str], node: int, ranks: int) -> None:
    """Defaults for the libraries; what is set already stays."""
    cpus = int(environ.get("SLURM_CPUS_ON_NODE", "0")) or len(os.sched_getaffinity(0))
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cpus // max(1, ranks))),
        "PYTHONSAFEPATH": "1",  # a folder that happens to be named like a module must not stand in for it
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TRITON_CACHE_DIR": own_folder("triton"),  # on a shared disk ranks of many nodes wait for each other's locks
    }
    link = interface_to(nodes[1 if node == 0 else 0]) if len(nodes) > 1 else "lo"
    if link:
        defaults |= {"GLOO_SOCKET_IFNAME": link, "NCCL_SOCKET_IFNAME": f"={link}"}
    for name, value in defaults.items():
        environ.setdefault(name, value)


def own_folder(name: str) -> str:
    """A folder on the node's own disk that nobody else can write: code is loaded from it."""
    path = Path(tempfile.gettempdir(), f"megalm-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        state = path.lstat()
        if path.is_symlink() or state.st_uid != os.getuid() or state.st_mode & 0o022:
            raise PermissionError(f"{path} belongs to somebody else")
    except OSError:
        path = Path(tempfile.mkdtemp(prefix="megalm-"))
    return str(path / name)


def interface_to(host: str) -> str:
    """The interface that leads to another machine, such as eth0; empty where there is no telling.

    gloo takes the one that the own host name's address belongs to, which on many systems is 127.0.1.1: nobody reaches it.
    """
    try:
        address = socket.gethostbyname(host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: asks for the route
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                try:
                    answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                except OSError:
                    continue
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    except OSError:
        return ""
    return ""


if __name__ == "__main__":
    main()
