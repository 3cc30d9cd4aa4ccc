"""Between the agents of a run's nodes: lines of JSON over TCP. Node 0's agent leads; the others do as it says. No torch.

    node -> lead   {"hello": token, "node": 3, "host": "n3"}            first, or the connection is closed
                   {"ranks": [status of each of its ranks], "attempt": "0.2", "asked": false}  on a change, else twice a second
    lead -> node   {"start": "0.2", "address": "10.0.0.1", "port": 41234}      {"stacks": true}      {"kill": true}
                   {"ping": true}    once a second        {"end": 75}    exit with that code

A side that is silent for LOST_SECONDS is gone: a node without power closes no connection. The lead listens on the address
that the nodes know it by, and on no other; whoever does not know the token (MEGALM_TOKEN) is not listened to.
"""

from __future__ import annotations

import errno
import hmac
import json
import selectors
import socket
import time
from typing import Any

from megalm.errors import ConfigError, Problem, RunError
from megalm.parallel.signals import StopRequest
from megalm.parallel.verdict import RankStatus

LOST_SECONDS = 15.0
PING_SECONDS = 1.0
_PORT_SECONDS = 15.0
_HELLO_BYTES = 4096  # a stranger is not listened to for longer
_MOST_BYTES = 1 << 24
_MOST_STRANGERS = 64  # at a time, beside the run's own nodes: a process has so many open files

Message = dict[str, Any]


class Wire:
    """One connection: messages out, messages in, without ever waiting to read."""

    def __init__(self, connection: socket.socket):
        self.socket, self.buffer, self.limit = connection, b"", _MOST_BYTES
        self.heard = self.told = time.monotonic()
        self.open = True
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Message) -> None:
        """Afterwards `open` says whether it could be."""
        try:
            self.socket.settimeout(LOST_SECONDS)
            self.socket.sendall(json.dumps(message).encode() + b"\n")
            self.told = time.monotonic()
        except OSError:
            self.close()

    def receive(self) -> list[Message]:
        """All that has arrived. Closes the wire at the end of the stream, and if what arrives is no message."""
        while self.open:
            try:
                self.socket.settimeout(0)
                data = self.socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data or len(self.buffer) + len(data) > self.limit:
                self.close()
                break
            self.buffer += data
            self.heard = time.monotonic()
        *lines, self.buffer = self.buffer.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            messages = [None]
        if not all(isinstance(message, dict) for message in messages):
            self.close()
            return []
        return messages

    def close(self) -> None:
        self.open = False
        self.socket.close()


class Peers:
    """The lead's side: the agents of the other nodes."""

    def __init__(self, num_nodes: int = 1, address: str = "127.0.0.1", port: int = 0, token: str = ""):
        """Listen, if there are others. Raises ConfigError or RunError if that cannot be (see _listen)."""
        self.num_nodes, self.token = num_nodes, token
        self.wires: dict[int, Wire] = {}  # by node
        self.hosts: dict[int, str] = {}
        self.ranks: dict[int, list[RankStatus]] = {}
        self.attempt, self.asked = "", False
        self.strangers: list[Wire] = []
        self.server: socket.socket | None = None
        if num_nodes > 1:
            self.server = _listen(address, port)

    @property
    def port(self) -> int:
        return self.server.getsockname()[1] if self.server else 0

    def gather(self, seconds: float, stop: StopRequest) -> bool:
        """Wait until all nodes' agents are there; False: this one was asked to stop before.

        Raises RunError naming those that are not there after `seconds`.
        """
        deadline = time.monotonic() + seconds
        while len(self.wires) < self.num_nodes - 1:
            self.look(0.1)
            if stop.signal:
                return False
            if time.monotonic() > deadline:
                missing = [str(node) for node in range(1, self.num_nodes) if node not in self.wires]
                rule = f"the agents of nodes {', '.join(missing)} of {self.num_nodes} did not arrive within {seconds:g} s"
                fix = "see in their logs why they did not start; else the firewall between the nodes"
                raise RunError(Problem("cluster.rendezvous_seconds", seconds, rule, "", fix))
        return True

    def tell(self, message: Message) -> None:
        """To all nodes. With "start" what they have said of their ranks before is forgotten."""
        if "start" in message:
            self.attempt, self.ranks = message["start"], {}
        for wire in self.wires.values():
            if wire.open:
                wire.send(message)

    def look(self, seconds: float) -> bool:
        """Take what the nodes say for `seconds`, or until one says something, and ping them. Whether one did."""
        if self.server is None:
            time.sleep(seconds)
            return False
        something = False
        with selectors.DefaultSelector() as selector:
            for source in (self.server, *(w.socket for w in (*self.wires.values(), *self.strangers) if w.open)):
                selector.register(source, selectors.EVENT_READ)
            selector.select(seconds)
        self._admit()
        for node, wire in self.wires.items():
            for message in wire.receive():
                self._note(node, message)
                something = True
            if wire.open and time.monotonic() - wire.told > PING_SECONDS:
                wire.send({"ping": True})
        return something

    def statuses(self) -> list[RankStatus]:
        """As last told, of the present start."""
        return [status for node in sorted(self.ranks) for status in self.ranks[node]]

    def all_told(self) -> bool:
        """Every node has said something of the present start."""
        return len(self.ranks) == self.num_nodes - 1

    def lost(self) -> list[str]:
        """Hosts that are gone."""
        now = time.monotonic()
        gone = [node for node, wire in self.wires.items() if not wire.open or now - wire.heard > LOST_SECONDS]
        return [self.hosts[node] for node in gone]

    def suspended(self, seconds: float) -> None:
        """This process did not run for so long: nobody's silence counts."""
        for wire in self.wires.values():
            wire.heard += seconds

    def close(self) -> None:
        for wire in (*self.wires.values(), *self.strangers):
            wire.close()
        if self.server is not None:
            self.server.close()

    def _admit(self) -> None:
        """New connections, and those that have said who they are."""
        assert self.server is not None
        try:
            while len(self.strangers) < self.num_nodes + _MOST_STRANGERS:
                wire = Wire(self.server.accept()[0])
                wire.limit = _HELLO_BYTES
                self.strangers.append(wire)
        except OSError:  # nobody more, or one that has gone already
            pass
        for wire in list(self.strangers):
            messages = wire.receive()
            if messages and self._knows(messages[0]):
                node = int(messages[0]["node"])
                wire.limit = _MOST_BYTES
                self.wires[node], self.hosts[node] = wire, str(messages[0]["host"])
                self.strangers.remove(wire)
                for message in messages[1:]:
                    self._note(node, message)
            elif messages or not wire.open or time.monotonic() - wire.heard > LOST_SECONDS:
                wire.close()
                self.strangers.remove(wire)

    def _knows(self, hello: Message) -> bool:
        """A node of this run, that is not here already."""
        node, token = hello.get("node"), hello.get("hello")
        expected = isinstance(node, int) and 0 < node < self.num_nodes and node not in self.wires
        if not expected or not isinstance(token, str):
            return False
        return hmac.compare_digest(token.encode(errors="surrogatepass"), self.token.encode())

    def _note(self, node: int, message: Message) -> None:
        self.asked |= bool(message.get("asked"))
        if "ranks" in message and message.get("attempt") == self.attempt:
            self.ranks[node] = [RankStatus.of_plain(plain) for plain in message["ranks"]]


def connect(address: str, port: int, node: int, host: str, token: str, seconds: float) -> Wire:
    """A node's side. Raises RunError if the lead cannot be reached within `seconds`."""
    deadline, pause = time.monotonic() + seconds, 0.05
    while True:
        try:
            wire = Wire(socket.create_connection((address, port), timeout=max(1.0, min(10.0, seconds))))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                rule = f"node {node}'s agent must reach node 0's within {seconds:g} s ({error.strerror or error})"
                fix = "see in node 0's log why it did not start; else the firewall between the nodes"
                raise RunError(Problem("--head", f"{address}:{port}", rule, "", fix)) from error
            time.sleep(pause)
            pause = min(1.0, 2 * pause)
    wire.send({"hello": token, "node": node, "host": host})
    return wire


def _listen(address: str, port: int) -> socket.socket:
    """A port that is in use is waited for: whoever had it before, an earlier start of this job perhaps, may be on its way out.

    Raises RunError if it stays so, ConfigError if this node cannot listen there at all.
    """
    deadline = time.monotonic() + _PORT_SECONDS
    while True:
        try:
            server = socket.create_server((address, port), backlog=4096)
            break
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            if in_use and time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            rule = f"node 0's agent must be able to listen there ({error.strerror or error})"
            problem = Problem("--head", f"{address}:{port}", rule, "", "another --port, or node 0's own address")
            raise (RunError if in_use else ConfigError)(problem) from error
    server.setblocking(False)
    return server
