"""Look at a node before a run starts on it: disk, GPUs, driver, clock, and its links to the other nodes.

One task per node, started by srun; each prints one line of JSON. The nodes stand in a ring and add up a number over it, so
each link carries a message of a megabyte, and neighbours compare their clocks. Imports neither torch nor NCCL: a node with a
broken GPU must still be able to say so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

FREE_BYTES = 64 << 20  # of the node's own disk and of the run's folder
FREE_GPU = 0.9  # of a GPU's memory
_PAYLOAD = bytes(1 << 20)
_HEADER = struct.Struct("!32sqd")  # token, number, seconds since the epoch


@dataclass
class Report:
    """What a node says of itself. Bytes and seconds."""

    host: str
    problems: list[str] = field(default_factory=list)
    link: str = ""  # why the next node in the ring cannot be reached; empty: it can
    echo: str = ""  # why the sum did not end, which is some other node's fault
    deaf: str = ""  # why the node before cannot reach this one, which is no fault of theirs: the port is taken
    clock: float = 0.0  # how much the next node's clock is ahead of ours
    total: int = 0  # what the ring adds up to
    driver: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="megalm.launchers.slurm.preflight")
    parser.add_argument("--nodes", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    nodes, me = options.nodes.split(","), int(os.environ["SLURM_NODEID"])
    report = Report(nodes[me], [*check_disk(Path(options.run_dir)), *check_gpus(options.gpus)])
    report.driver = _driver() if options.gpus else ""
    if len(nodes) > 1:
        ring(report, nodes, me, options.port, os.environ.get("MEGALM_TOKEN", ""), options.seconds)
    print(json.dumps(asdict(report)), flush=True)


def check_disk(run_dir: Path) -> list[str]:
    """The run's folder is there and can be written; there is room in it, and on the node's own disk."""
    problems = []
    for name, folder in (("train.run_dir", run_dir), ("the node's own disk", Path(tempfile.gettempdir()))):
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".megalm-") as file:
                file.write(b"x" * 4096)
                file.flush()
                os.fsync(file.fileno())
            free = shutil.disk_usage(folder).free
            if free < FREE_BYTES:
                problems.append(f"{name} ({folder}) has {free >> 20} MiB left, fewer than {FREE_BYTES >> 20}")
        except OSError as error:
            problems.append(f"{name} ({folder}) cannot be written: {error.strerror or error}")
    return problems


def check_gpus(wanted: int) -> list[str]:
    """There are so many, their memory is free, and they have counted no errors that cannot be corrected.

    Only the job's own are looked at: nvidia-smi shows all where SLURM does not hide the others' by cgroups.
    """
    given = {name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name}
    if not wanted or any(name.startswith("MIG-") for name in given):  # nvidia-smi has no numbers of a part of a GPU
        return []
    try:
        rows = _query("index,uuid,memory.total,memory.used,ecc.errors.uncorrected.volatile.total")
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi does not work: {error}"]
    rows = [row for row in rows if not given or given & set(row[:2])]
    problems = [] if len(rows) >= wanted else [f"{len(rows)} GPUs instead of {wanted}"]
    for index, _, total, used, errors in rows:
        if total.isdigit() and used.isdigit() and int(used) > (1 - FREE_GPU) * int(total):  # [N/A] where memory is shared
            problems.append(f"GPU {index}: {used} of {total} MiB are in use already")
        if errors.isdigit() and int(errors) > 0:
            problems.append(f"GPU {index}: {errors} memory errors that could not be corrected")
    return problems


def _query(fields: str) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def _driver() -> str:
    try:
        return _query("driver_version")[0][0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def ring(report: Report, nodes: Sequence[str], me: int, port: int, token: str, seconds: float) -> None:
    """Sum of 1..N over the nodes, a number passed from each to the next N-1 times; the result is report.total."""
    deadline, following = time.monotonic() + seconds, nodes[(me + 1) % len(nodes)]
    key = token.encode().ljust(32, b"0")[:32]
    previous: list[socket.socket] = []
    try:
        listener = socket.create_server((_own_address(following), port + me))
    except OSError as error:
        report.deaf = f"port {port + me} is not free: {error}"
    else:
        listener.settimeout(seconds)
        accepting = threading.Thread(target=_accept, args=(listener, key, previous), daemon=True)
        accepting.start()
    try:
        out, report.clock = _connect(following, port + (me + 1) % len(nodes), key, deadline)
    except OSError as error:
        report.link = str(error)
        return
    if report.deaf:
        return
    try:
        accepting.join(max(0.1, deadline - time.monotonic()))
        if not previous:
            raise TimeoutError(f"nothing came from {nodes[me - 1]}")
        number = report.total = me + 1
        for _ in range(len(nodes) - 1):
            sender = threading.Thread(target=_send, args=(out, key, number), daemon=True)
            sender.start()  # all nodes send at once: whoever waits for his own message to be read waits for ever
            number = _receive(previous[0], key)[1]
            _read(previous[0], len(_PAYLOAD))
            sender.join(max(0.1, deadline - time.monotonic()))
            report.total += number
    except OSError as error:
        report.echo = str(error)


def _own_address(following: str) -> str:
    """Of the interface that leads to the next node; every one where there is no route yet."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((socket.gethostbyname(following), 9))
            return probe.getsockname()[0]
    except OSError:
        return ""


def _accept(listener: socket.socket, key: bytes, accepted: list[socket.socket]) -> None:
    """Take the neighbour's connection, tell it our time; whoever does not know the token is sent away."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.settimeout(listener.gettimeout())
        try:
            _receive(connection, key)
            connection.sendall(_HEADER.pack(key, 0, time.time()))
        except OSError:
            connection.close()
            continue
        accepted.append(connection)
        return


def _connect(host: str, port: int, key: bytes, deadline: float) -> tuple[socket.socket, float]:
    """(connection, how much the other clock is ahead), half of the way there and back assumed on each way."""
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=max(0.1, min(5.0, deadline - time.monotonic())))
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    connection.settimeout(max(0.1, deadline - time.monotonic()))
    sent = time.time()
    connection.sendall(_HEADER.pack(key, 0, sent))
    theirs = _receive(connection, key)[2]
    return connection, theirs - (sent + time.time()) / 2


def _send(connection: socket.socket, key: bytes, number: int) -> None:
    try:
        connection.sendall(_HEADER.pack(key, number, time.time()) + _PAYLOAD)
    except OSError:
        return  # the receiver says so


def _receive(connection: socket.socket, key: bytes) -> tuple[bytes, int, float]:
    token, number, seconds = _HEADER.unpack(_read(connection, _HEADER.size))
    if token != key:
        raise ConnectionRefusedError("somebody who does not know the token")
    return token, number, seconds


def _read(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = connection.recv(min(count, 1 << 16))
        if not part:
            raise ConnectionResetError("the connection was closed")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


if __name__ == "__main__":
    main()
