"""When the warp-specialised forward is used: which calls it takes, and what becomes of a trial that fails, dies or hangs."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm_kernels import compat
from megalm_kernels.attention import hopper, hopper_trial
from megalm_kernels.attention.call import ALL, Call
from megalm_kernels.attention.hopper import CANNOT_TELL, SECONDS, STARTED, Verdict, settle, takes
from megalm_kernels.device import attention_hopper
from megalm_kernels.launch import capture
from megalm_kernels.specimens import identity

GPU = torch.device("cuda", 0)
CAUSAL = Call(ALL, 0, 0.125)
FINE = 'print(\'{"fault": ""}\')'
WRONG = 'print(\'{"fault": "lse off by 3"}\')'
STARTS = f"print({STARTED!r}, flush=True)"


def child(code: str, note: Path | None = None) -> list[str]:
    """A trial that does this instead; each leaves a line in `note`."""
    return [sys.executable, "-S", "-c", f"open({str(note)!r}, 'a').write('run\\n')\n{code}" if note else code]


@pytest.mark.parametrize(
    ("code", "good", "reason", "kept"),
    [
        (FINE, True, "passed its trial in 0 s", True),
        (f"print('warming up'); {STARTS}; {FINE}", True, "passed", True),
        (f"{STARTS}; import os; os.kill(os.getpid(), 14)", False, "did not end within 20 s: it hangs", True),
        ("import os; os.kill(os.getpid(), 14)", False, "after 20 s its trial was still importing torch, or compiling", False),
        (STARTS, False, "ended with code 0", True),
        (WRONG, False, "it is wrong: lse off by 3", True),
        ("import os; os.kill(os.getpid(), 11)", False, "ended with code -11: it said nothing", True),
        ("import sys; sys.exit('an illegal memory access')", False, "ended with code 1: an illegal memory access", True),
        ("pass", False, "ended with code 0", True),
        ("print('[1]')", False, "ended with code 0", True),
        (f"{FINE}; import sys; print('no GPU', file=sys.stderr); sys.exit({CANNOT_TELL})", False, "be tried: no GPU", False),
    ],
)
def test_what_a_trial_says(tmp_path: Path, code: str, good: bool, reason: str, kept: bool) -> None:
    place, note = tmp_path / "new" / "verdict.json", tmp_path / "note"
    verdict = settle(place, child(code, note), 20.0)
    assert verdict.good == good and reason in verdict.reason
    assert place.exists() == kept
    assert (f"kept in {place}: delete it" in verdict.reason) == (kept and not good)
    again = settle(place, child(code, note), 20.0)
    assert again.good == good and (again == verdict or not kept)
    assert note.read_text().count("run") == (1 if kept else 2)


def test_a_trial_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    place, note = tmp_path / "verdict.json", tmp_path / "pids"
    sleeper = f"{STARTS}; import os, time; os.fork(); open({str(note)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(60)"
    begin = time.monotonic()
    verdict = settle(place, child(sleeper), 2.0)  # by then it has said so, on a busy machine too
    assert time.monotonic() - begin < 9
    again = f"(kept in {place}: delete it to have it tried again)"
    assert not verdict.good and verdict.reason == f"its trial did not end within 2 s: it hangs {again}"
    pids = note.read_text().split()
    assert len(pids) == 2
    for pid in pids:
        end = time.monotonic() + 5
        while is_running(pid) and time.monotonic() < end:
            time.sleep(0.02)
        assert not is_running(pid)
    assert settle(place, child(FINE), 1.0) == verdict  # and is not tried again
    place.unlink()
    assert settle(place, child(FINE), 20.0).good


@pytest.mark.parametrize("said", ["", "print('{\"started\": false}', flush=True); "])
def test_a_trial_that_is_slow_to_begin_is_made_again(tmp_path: Path, said: str) -> None:
    place = tmp_path / "verdict.json"
    verdict = settle(place, child(f"{said}import time; time.sleep(60)"), 0.5)
    assert verdict == Verdict(False, "after 0 s its trial was still importing torch, or compiling") and not place.exists()
    assert settle(place, child(FINE), 20.0).good


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_of_several_processes_one_tries_and_the_others_wait(tmp_path: Path) -> None:
    place, note = tmp_path / "verdict.json", tmp_path / "note"
    command = child(f"import time; time.sleep(0.4); {FINE}", note)
    with ThreadPoolExecutor(4) as pool:  # each opens the lock for itself, as processes do
        verdicts = list(pool.map(lambda _: settle(place, command, 20.0), range(4)))
    assert [verdict.good for verdict in verdicts] == [True] * 4
    assert note.read_text() == "run\n"


def test_nobody_waits_for_ever(tmp_path: Path) -> None:
    with hopper._alone(tmp_path / "verdict.lock", 1.0):
        verdict = settle(tmp_path / "verdict.json", child(FINE), 0.2)
    assert verdict == Verdict(False, "another process is still trying it after 0 s")


def test_a_file_that_is_no_verdict_is_written_anew(tmp_path: Path) -> None:
    place = tmp_path / "verdict.json"
    for text in ("", "[]", '{"good": true}', '{"good": true, "reason": "", "more": 1}'):
        place.write_text(text)
        assert settle(place, child(WRONG), 20.0).reason.startswith("it is wrong: lse off by 3 (kept in")
        assert json.loads(place.read_text())["good"] is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["verdict.json", "verdict.lock"]


def test_without_a_place_for_the_verdict_nothing_is_tried(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    note = tmp_path / "note"
    verdict = settle(tmp_path / "file" / "verdict.json", child(FINE, note), 20.0)
    assert not verdict.good and "cannot be kept in" in verdict.reason and not note.exists()


def refused(queries: int = 256, keys: int = 256, channels: int = 64, dtype: torch.dtype = torch.bfloat16, **call: Any) -> str:
    q = torch.empty(2, queries, 4, channels, dtype=dtype, device="meta")
    k = torch.empty(2, keys, 2, channels, dtype=dtype, device="meta")
    return takes(q, k, replace(CAUSAL, **call))


def test_the_calls_that_it_takes() -> None:
    for channels in hopper.HEAD_DIMS:
        for dtype in (torch.bfloat16, torch.float16):
            assert refused(channels=channels, dtype=dtype) == "" == refused(keys=1280, right=ALL, channels=channels, dtype=dtype)
    assert refused(queries=512, right=ALL) == ""
    assert refused(return_lse=True) == refused(deterministic=False) == ""


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (dict(queries=257), "257 queries and 256 keys"),
        (dict(keys=320), "256 queries and 320 keys"),
        (dict(queries=512), "see no key"),
        (dict(queries=0), "nothing to do"),
        (dict(channels=96), "a head of 96 channels"),
        (dict(dtype=torch.float32), "torch.float32"),
        (dict(left=128), "a sliding window"),
        (dict(right=5), "a sliding window"),
        (dict(scale=0.0), "a scale of 0"),
        (dict(softcap=30.0), "softcap"),
        (dict(dropout_p=0.1), "dropout"),
        (dict(alibi_slopes=torch.ones(4)), "ALiBi"),
        (dict(sinks=torch.ones(4)), "sinks"),
        (dict(cu_seqlens_q=torch.zeros(1), cu_seqlens_k=torch.zeros(1)), "packed sequences"),
    ],
)
def test_the_calls_that_it_does_not_take(call: dict[str, Any], reason: str) -> None:
    assert reason in refused(**call)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A pretended sm_90 whose trial is `code`."""
    facts: dict[str, Any] = {"arch": 90, "code": FINE, "note": tmp_path / "note"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(hopper, "capability", lambda number: facts["arch"])
    monkeypatch.setattr(compat, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(hopper, "_verdicts", {})

    def settled(place: Path, command: list[str], seconds: float) -> Verdict:
        assert command == [sys.executable, "-m", "megalm_kernels.attention.hopper_trial", "0", "180"] and seconds == SECONDS
        return settle(place, child(facts["code"], facts["note"]), 20.0)

    monkeypatch.setattr(hopper, "settle", settled)
    yield facts
    hopper.use(True)


def test_it_is_tried_once_and_said_why_not(gpu: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    gpu["code"] = WRONG
    assert hopper.state() == "not tried yet"
    assert [hopper.ready(GPU), hopper.ready(GPU), hopper.ready(torch.device("cuda"))] == [False] * 3
    reason = f"it is wrong: lse off by 3 (kept in {hopper._place_of(0)}: delete it to have it tried again)"
    assert [record.getMessage() for record in caplog.records] == [
        f"the ordinary attention forward is used on this sm_90, not the warp-specialised one: {reason}"
    ]
    assert hopper.state() == f"off: {reason}"
    hopper._verdicts.clear()  # another process, which finds what is kept
    assert hopper.state() == f"off: {reason}" and not hopper.ready(GPU)
    assert gpu["note"].read_text() == "run\n"


def test_it_is_used_after_it_has_passed(gpu: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert hopper.ready(GPU) and hopper.ready(GPU)
    assert len(caplog.records) == 1 and "is used: it passed" in caplog.text
    assert hopper.state().startswith("on: it passed its trial in")
    hopper.use(False)
    assert not hopper.ready(GPU) and hopper.state() == "off: switched off"


@pytest.mark.parametrize("where", ["cuda.is_current_stream_capturing", "compiler.is_compiling"])
def test_nothing_is_tried_in_a_graph(where: str, gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    inside = [True]
    monkeypatch.setattr(f"torch.{where}", lambda: inside[0])
    assert not hopper.ready(GPU) and not gpu["note"].exists()
    inside[0] = False
    assert hopper.ready(GPU)
    inside[0] = True
    assert hopper.ready(GPU)  # what is known counts


def test_nothing_is_tried_elsewhere(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hopper.ready(torch.device("cpu")) and not hopper.ready(torch.device("meta"))
    gpu["arch"] = 100
    assert not hopper.ready(GPU) and hopper.state() == "off: it is for sm_90, and this is sm_100"
    hopper._verdicts.clear()
    assert hopper.state() == "off: it is for sm_90, and this is sm_100"
    gpu["arch"] = 90
    monkeypatch.setattr(compat, "interpreting", lambda: True)
    assert not hopper.ready(GPU) and not gpu["note"].exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hopper.state() == "off: there is no GPU"


def test_the_verdict_is_of_this_gpu_these_versions_and_this_source(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    places = [hopper._place_of(0)]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "another GPU")
    places.append(hopper._place_of(0))
    monkeypatch.setattr(compat, "version", lambda: "4.0.0")
    places.append(hopper._place_of(0))
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "attention_hopper.py"))
    places.append(hopper._place_of(0))
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.parts[-2:] == ("attention", "hopper.py")))
    places.append(hopper._place_of(0))
    assert len(set(places)) == 5 and {place.parent for place in places} == {compat.cache_folder()}


def test_the_trial_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the child does, but for the GPU."""
    alarms: list[int] = []
    monkeypatch.setattr(hopper_trial.signal, "alarm", alarms.append)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(hopper_trial, "_BYTES", 1)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: None)
    monkeypatch.setattr(hopper_trial, "prepare", lambda forward, device: print(f"compiles {forward.__name__} for {device}"))
    monkeypatch.setattr(hopper_trial, "find_fault", lambda forward, device: f"{forward.__name__} on {device}")
    assert hopper_trial.main("3", "17") == 0 and alarms == [17]
    said = capsys.readouterr().out.splitlines()
    assert said == ["compiles forward for cuda:3", STARTED, '{"fault": "forward on cuda:3"}']

    def full(device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out\nof memory")

    monkeypatch.setattr(torch.cuda, "set_device", full)
    assert hopper_trial.main("0", "17") == CANNOT_TELL
    assert capsys.readouterr().err == "OutOfMemoryError: CUDA out of memory\n"


def test_before_the_trial_every_kernel_that_it_launches_is_compiled_and_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple] = []
    loaded: list[str] = []

    class Kernel:
        run = property(lambda self: loaded.append("once"))

    def warmup(*args: Any, grid: tuple[int, ...], **meta: Any) -> Kernel:
        compiled.append((args, grid, meta))
        return Kernel()

    monkeypatch.setattr(attention_hopper._forward_hopper, "warmup", warmup)
    cases = [hopper_trial.Case((1, 128, 256, 2, 1, channels), causal) for channels in (64, 128) for causal in (True, False)]
    hopper_trial.prepare(attention_hopper.forward, torch.device("cpu"), cases)
    assert len(loaded) == len(compiled) == len(cases)
    for case, (args, grid, meta) in zip(cases, compiled, strict=True):
        with capture(90) as launches:
            attention_hopper.forward(*hopper_trial.make(case, torch.device("cpu")), -1, case.call.right, case.call.scale)
        assert meta.pop("enable_fp_fusion")
        same = replace(launches[0], args=args, grid=grid, meta=meta)
        assert identity(same) == identity(launches[0]) and grid == launches[0].grid


def test_the_trial_sees_a_result_that_varies() -> None:
    runs: list[int] = []

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = hopper_trial.attention_reference(q, k, v, Call(*rest))
        runs.append(len(runs))
        return out, lse + (1e-6 if len(runs) == 3 else 0)

    case = hopper_trial.Case((1, 128, 128, 1, 1, 64), True)
    assert "a second run gave other bits" in hopper_trial.find_fault(forward, torch.device("cpu"), [case])
    assert hopper_trial.find_fault(forward, torch.device("cpu"), [case]) == ""


def test_the_child_can_import_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    here = os.path.dirname(compat.__file__)
    code = f"from importlib.util import find_spec; assert find_spec('megalm_kernels').origin.startswith({here!r}); {FINE}"
    assert settle(tmp_path / "verdict.json", child(code), 20.0).good
