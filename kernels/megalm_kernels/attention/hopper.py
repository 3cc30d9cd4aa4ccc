"""When the warp-specialised forward of sm_90 may be used: for which calls, and after it has been tried on this machine.

The first process that wants it has it tried in a child: a kernel with a fault in its barriers does not end, and a process whose
GPU hangs cannot go on. The verdict is kept in Triton's cache folder, for this GPU, these versions and this source, and the other
ranks of the node wait for it. Until there is a good one, and wherever there is none, the ordinary kernel runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megalm_kernels import compat
from megalm_kernels.attention.call import DTYPES, FEATURES, SUPPORT, Call
from megalm_kernels.launch import capability

ARCH = 90
TILE = 128  # queries of a program, and keys of a block
HEAD_DIMS = (64, 128)
SECONDS = 180.0  # for a trial: it imports torch, compiles five kernels and makes eighteen launches
STARTED = json.dumps({"started": True})  # the line that a trial prints when all is compiled, before its first launch
CANNOT_TELL = 75  # the trial's exit code, where it could not be made at all
_SOURCES = (
    "device/attention_hopper.py",
    "device/attention_tiles.py",
    "attention/hopper.py",
    "attention/hopper_trial.py",
    "tables.py",
)
_LACKS = [(name, asks) for name, asks in FEATURES.items() if name not in SUPPORT["hopper"]]

_log = logging.getLogger(__name__)
_lock = threading.Lock()


@dataclass(frozen=True)
class Verdict:
    """Whether the kernel may be used, and if not, why not."""

    good: bool
    reason: str


OFF = Verdict(False, "off: switched off")
_wanted = True
_verdicts: dict[int, Verdict] = {}  # by the number of the GPU


def use(wanted: bool) -> None:
    """Whether this process may use the kernel at all."""
    global _wanted
    _wanted = wanted


def takes(q: Tensor, k: Tensor, call: Call) -> str:
    """Why the ordinary kernel has to serve this call; empty if this one can. Says nothing of the machine: see `ready`."""
    for feature, asks in _LACKS:
        if asks(call):
            return f"it has no kernel for {feature}"
    if q.dtype not in DTYPES["hopper"]:
        return f"it has no kernel for {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"it has no kernel for a head of {q.shape[-1]} channels"
    if call.scale <= 0:  # -inf, which stands for what is masked, times 0 is not a number
        return "it has no kernel for a scale of 0"
    queries, keys = q.shape[1], k.shape[1]
    if q.numel() == 0 or k.numel() == 0:
        return "there is nothing to do"
    if queries % TILE or keys % TILE:
        return f"{queries} queries and {keys} keys are not both multiples of {TILE}"
    if call.causal and queries > keys:
        return "some queries see no key"
    return ""


def ready(device: torch.device) -> bool:
    """Whether the kernel may be launched on this GPU now. The first call has it tried, which takes seconds, and says so.

    Not while a CUDA graph is captured or torch.compile looks on: then only what is known already counts.
    """
    if not _wanted or device.type != "cuda":
        return False
    number = torch.cuda.current_device() if device.index is None else device.index
    known = _verdicts.get(number)
    if known is None:
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return False
        with _lock:
            known = _verdicts.get(number) or _judge(number)
            _verdicts[number] = known
    return known.good


def state() -> str:
    """For people: what is known of the kernel in this process, without finding out more."""
    if not _wanted:
        return OFF.reason
    if not torch.cuda.is_available():
        return "off: there is no GPU"
    number = torch.cuda.current_device()
    if number in _verdicts:
        verdict = _verdicts[number]
        return f"on: {verdict.reason}" if verdict.good else f"off: {verdict.reason}"
    if obstacle := _obstacle(number):
        return f"off: {obstacle}"
    kept = _read(_place_of(number))
    return "not tried yet" if kept is None else f"{'on' if kept.good else 'off'}: {kept.reason}"


def _judge(number: int) -> Verdict:
    """Once per process and GPU."""
    if obstacle := _obstacle(number):
        return Verdict(False, obstacle)
    command = [sys.executable, "-m", "megalm_kernels.attention.hopper_trial", str(number), str(round(SECONDS))]
    verdict = settle(_place_of(number), command, SECONDS)
    if verdict.good:
        _log.info("the warp-specialised attention forward of sm_90 is used: %s", verdict.reason)
    else:
        _log.warning("the ordinary attention forward is used on this sm_90, not the warp-specialised one: %s", verdict.reason)
    return verdict


def _obstacle(number: int) -> str:
    """Why there is nothing to try."""
    if not compat.installed() or compat.interpreting():
        return "Triton cannot compile here"
    arch = capability(number)
    return "" if arch == ARCH else f"it is for sm_{ARCH}, and this is sm_{arch}"


def _place_of(number: int) -> Path:
    """Where the verdict on this GPU, with these versions and sources, is kept."""
    folder = Path(__file__).parent.parent
    sources = [(folder / name).read_bytes() for name in _SOURCES]
    known = [torch.cuda.get_device_name(number), torch.__version__, str(torch.version.cuda), compat.version()]
    key = hashlib.sha256(b"\0".join([*(name.encode() for name in known), *sources])).hexdigest()[:24]
    return compat.cache_folder() / f"attention-hopper-{key}.json"


def settle(place: Path, command: Sequence[str], seconds: float) -> Verdict:
    """The verdict that is kept in `place`, or that of running `command`, by one process of all that ask at the same time."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _alone(place.with_suffix(".lock"), 2 * seconds):
            kept = _read(place)
            if kept is not None:
                return kept
            verdict, keep = _try(command, seconds)
            if keep and not verdict.good:
                verdict = replace(verdict, reason=f"{verdict.reason} (kept in {place}: delete it to have it tried again)")
            if keep:
                _write(place, verdict)
            return verdict
    except TimeoutError:
        return Verdict(False, f"another process is still trying it after {2 * seconds:.0f} s")
    except OSError as error:
        return Verdict(False, f"the verdict on it cannot be kept in {place.parent}: {error}")


@contextmanager
def _alone(path: Path, seconds: float) -> Iterator[None]:
    """Hold a lock that goes with the process, so that none is left behind. Raises TimeoutError."""
    import fcntl  # not on every system that this file is imported on

    end = time.monotonic() + seconds
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError from None
                time.sleep(0.05)
        yield


def _try(command: Sequence[str], seconds: float) -> tuple[Verdict, bool]:
    """The verdict of a child, and whether it will be the same the next time."""
    begin = time.monotonic()
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    child = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, complaint = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        _kill(child)
        return _late(seconds, (error.output or b"").decode(errors="replace"))
    if child.returncode == -signal.SIGALRM:
        return _late(seconds, said)
    last = (complaint.strip().splitlines() or ["it said nothing"])[-1]
    if child.returncode == CANNOT_TELL:
        return Verdict(False, f"it could not be tried: {last}"), False
    try:
        fault = json.loads(said.strip().splitlines()[-1])["fault"] if child.returncode == 0 else None
    except (ValueError, LookupError, TypeError):
        fault = None
    if fault is None:
        return Verdict(False, f"its trial ended with code {child.returncode}: {last}"), True
    if fault:
        return Verdict(False, f"it is wrong: {fault}"), True
    return Verdict(True, f"it passed its trial in {time.monotonic() - begin:.0f} s"), True


def _late(seconds: float, said: str) -> tuple[Verdict, bool]:
    """Only what hangs after everything was compiled is the kernel's fault: a slow disk may be a faster one the next time."""
    if STARTED in said.splitlines():
        return Verdict(False, f"its trial did not end within {seconds:.0f} s: it hangs"), True
    return Verdict(False, f"after {seconds:.0f} s its trial was still importing torch, or compiling"), False


def _kill(child: subprocess.Popen) -> None:
    """With all that it started. A process in the middle of a call to the driver may take its time to go: it is not waited for."""
    os.killpg(child.pid, signal.SIGKILL)
    try:
        child.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        _log.warning("process %d, the trial of a kernel, hangs in the driver and cannot be ended", child.pid)


def _read(place: Path) -> Verdict | None:
    try:
        return Verdict(**json.loads(place.read_text()))
    except (OSError, ValueError, TypeError):  # none, or one of another version
        return None


def _write(place: Path, verdict: Verdict) -> None:
    """At once or not at all."""
    part = place.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({"good": verdict.good, "reason": verdict.reason}))
    os.replace(part, place)
