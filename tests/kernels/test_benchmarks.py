"""The benchmark of the kernels measures every operation on a CPU, counts right, and tells what fails."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from contextlib import redirect_stdout
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from megalm.config.tasks import BENCHMARKS, PEERS
from megalm_kernels import dispatch
from megalm_kernels.benchmarks import FILES, find_cases, report, run
from megalm_kernels.benchmarks.__main__ import main
from megalm_kernels.benchmarks.harness import Absent, Case, Provider, Stopwatch, Work, find, measure, quantiles
from megalm_kernels.benchmarks.report import Ceilings, Row

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_gb_per_second=4000.0, gemm_tflops=800.0, copy_bytes=1, gemm_size=1)


def row(provider: str, p50: float, direction: str = "forward", **values: object) -> Row:
    start = Row("op", "8 x 8", "float32", provider, direction, "bytes", 4_000_000_000, 8_000_000_000, ms_p50=p50)
    return replace(start, **values)


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> tuple[int, str, Path]:
    """All operations on the CPU: exit code, what was printed, the folder of the results."""
    folder, out = tmp_path_factory.mktemp("benchmarks"), io.StringIO()
    with redirect_stdout(out):
        code = run(device="cpu", results=folder)
    return code, out.getvalue(), folder


def test_every_operation_is_measured_on_a_cpu_and_reported(everything):
    code, out, folder = everything
    assert code == 0, out
    assert out.startswith(f"({report.CPU_LABEL})")
    (file,) = folder.glob("*.json")
    found = json.loads(file.read_text())
    assert found["label"] == report.CPU_LABEL
    assert {r["operation"] for r in found["rows"]} == set(FILES)
    assert {r["provider"] for r in found["rows"]} == {"torch", "reference"}
    for r in found["rows"]:
        assert r["status"] == "ok", r
        assert 0 < r["ms_p20"] <= r["ms_p50"] <= r["ms_p80"]
        assert r["error"] < (1e-6 if r["dtype"] == "float32" else 2e-2), r
    for name in FILES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name


def test_the_schema_is_the_one_documented(everything):
    found = json.loads(next(everything[2].glob("*.json")).read_text())
    documented = set(re.findall(r"\w+", report.__doc__ or ""))
    for part in (found, found["rows"][0], found["ceilings"]):
        assert set(part) <= documented
    assert set(found["rows"][0]) == {field.name for field in fields(Row)}
    assert {"processor", "cores"} <= set(found["machine"])
    assert {"python", "torch", "triton", "liger-kernel"} <= set(found["versions"])


def test_every_operation_that_dispatch_knows_has_a_benchmark():
    with dispatch.use("torch", "cpu") as choices:
        known = {choice.operation for choice in choices}
    assert known <= set(FILES)
    assert set(FILES) - known == {"linear_cross_entropy", "attention_packed"}, "which go by the choice for another one"


def test_the_names_that_a_configuration_may_have_are_those_that_there_are():
    providers = {provider.name for sizes in ("tiny", "full") for case in find_cases(sizes=sizes) for provider in case.providers}
    assert set(PEERS) == providers - {"triton", "reference"}
    assert sorted(BENCHMARKS) == sorted(FILES)


def test_rates_and_ratios_from_made_up_times():
    ours, peer, slow = report.complete([row("triton", 2.0), row("a", 4.0), row("b", 8.0)], CEILINGS)
    assert ours.gb_per_second == pytest.approx(2000.0)  # 4 GB in 2 ms
    assert ours.percent_of_ceiling == pytest.approx(50.0)
    assert ours.tflops == pytest.approx(4.0)
    assert (ours.ratio_to_best_peer, peer.ratio_to_best_peer, slow.ratio_to_best_peer) == (2.0, 0.5, 0.25)


def test_a_product_is_measured_by_the_other_ceiling():
    (found,) = report.complete([row("triton", 2.0, bound="flops")], CEILINGS)
    assert found.percent_of_ceiling == pytest.approx(0.5)  # 4 of 800 TFLOP/s
    assert found.ratio_to_best_peer is None, "alone"


def test_directions_shapes_and_failures_do_not_compete():
    failed = row("c", 1.0, status="failed", ms_p50=None)
    rows = [row("triton", 2.0), row("a", 1.0, "backward"), row("b", 1.0, shape="9 x 9"), failed]
    assert report.complete(rows, CEILINGS)[0].ratio_to_best_peer is None


def test_variants_of_ours_are_no_peers_of_each_other():
    found = report.complete([row("triton", 2.0), row("triton unordered", 1.0), row("a", 4.0)], CEILINGS)
    assert [r.ratio_to_best_peer for r in found] == [2.0, 4.0, 0.25]


def test_a_peer_that_is_absent_in_several_ways_is_told_of_all_of_them():
    gaps = [row("a", 1.0, status="absent", reason=why, ms_p50=None) for why in ("no GQA", "no GQA", "not packed")]
    assert [gap["reason"] for gap in report.results(gaps, CEILINGS)["absent"]] == ["no GQA", "not packed"]


def test_quantiles():
    assert quantiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)
    assert quantiles([3.0]) == (3.0, 3.0, 3.0)


def toy(*providers: Provider, **values: object) -> Case:
    """y = 2 x."""
    start = Case(
        "toy", "4", torch.float32, lambda device: [torch.randn(4, device=device)], lambda x: 2 * x, providers, Work(32), Work(32),
        gradients=(0,),
    )  # fmt: skip
    return replace(start, **values)


def measured(case: Case) -> list[Row]:
    return list(measure(case, Stopwatch(CPU, 0.0)))


def test_a_provider_that_fails_is_reported_with_its_reason():
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image\nsecond line")

    rows = measured(toy(Provider("torch", lambda: broken), Provider("reference", lambda: lambda x: 2 * x)))
    assert [(r.provider, r.status, r.reason) for r in rows[:3]] == [("torch", "failed", "RuntimeError: no kernel image")] * 3
    assert [r.status for r in rows[3:]] == ["ok"] * 3
    assert "failed: RuntimeError: no kernel image" in report.line(rows[0])


def test_a_run_with_a_failure_ends_with_1(tmp_path, monkeypatch):
    def refuse(x: torch.Tensor) -> None:
        raise ValueError("refused")

    case = toy(Provider("torch", lambda: refuse))
    with_cases(monkeypatch, case)
    assert run(["toy"], "cpu", results=tmp_path) == 1
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {r["status"] for r in found["rows"]} == {"failed"}


def test_wrong_results_do_not_get_a_time_without_a_word():
    wrong = toy(Provider("torch", lambda: lambda x: 2.02 * x))
    assert measured(wrong)[0].error == pytest.approx(0.01, rel=1e-3)
    assert measured(wrong)[1].error == pytest.approx(0.01, rel=1e-3)
    nan = toy(Provider("torch", lambda: lambda x: x * torch.nan))
    assert {(r.status, r.reason) for r in measured(nan)} == {("failed", "ValueError: gives values that are not finite")}
    shape = toy(Provider("torch", lambda: lambda x: (2 * x)[:3]))
    assert {r.status for r in measured(shape)} == {"failed"}


def test_a_provider_that_overwrites_its_inputs_is_told_on():
    def overwriting(x: torch.Tensor) -> torch.Tensor:
        y = 2 * x
        x.data.zero_()
        return y

    assert all(r.changes_inputs for r in measured(toy(Provider("torch", lambda: overwriting))))
    assert not any(r.changes_inputs for r in measured(toy(Provider("torch", lambda: lambda x: 2 * x))))


def test_a_peer_that_is_not_there_is_absent_and_not_failed(tmp_path):
    rows = measured(toy(Provider("torch", lambda: find("no_such_package.ops", "f"))))
    assert {(r.status, r.reason) for r in rows} == {("absent", "no_such_package is not installed")}
    found = report.results(rows, CEILINGS)
    assert found["absent"] == [{"operation": "toy", "provider": "torch", "reason": "no_such_package is not installed"}]
    assert found["rows"] == []
    with pytest.raises(Absent):
        find("no_such_package", "f")


def test_ours_is_never_absent():
    with dispatch.use("torch", "cpu"):
        (case, *_) = find_cases(["rms_norm"], "tiny")
    ours = next(provider for provider in case.providers if provider.name == "triton")
    assert ours.choice == {"rms_norm": "triton"}
    rows = measured(replace(case, providers=[replace(ours, name="torch")]))
    assert {r.status for r in rows} == {"absent"}, "the CPU has no triton, and another name hides it"
    from megalm_kernels.benchmarks import harness

    exact = harness._Exact(case, CPU)
    rows = list(harness._measure_provider(case, ours, Stopwatch(CPU, 0.0), exact))
    assert {r.status for r in rows} == {"failed"}


def test_only_the_peers_that_were_named_are_measured():
    case = toy(Provider("torch", lambda: lambda x: 2 * x), Provider("reference", lambda: lambda x: 2 * x))
    rows = list(measure(case, Stopwatch(CPU, 0.0), ["reference"]))
    assert {r.provider for r in rows} == {"reference"}


def with_cases(monkeypatch: pytest.MonkeyPatch, *cases: Case) -> None:
    monkeypatch.setattr("megalm_kernels.benchmarks.find_cases", lambda ops, sizes: iter(cases))


def test_who_was_not_measured_is_said_in_one_line(everything):
    (said,) = (line for line in everything[1].splitlines() if line.startswith("absent"))
    assert re.fullmatch(r"absent: triton, .*liger.* \(needs a GPU\)", said)


def test_a_run_that_measures_nothing_says_so_and_ends_with_1(tmp_path, monkeypatch, capsys):
    gone = Provider("torch", lambda: find("no_such_package", "f"))
    with_cases(monkeypatch, toy(gone, Provider("liger", lambda: torch.relu)))
    assert run(["toy"], "cpu", results=tmp_path, peers=["torch", "liger", "lgier"]) == 1
    out = capsys.readouterr().out
    why = "lgier (no provider of these operations); torch (no_such_package is not installed); liger (needs a GPU)"
    assert f"absent: {why}\nnothing was measured\n" in out
    assert "picture" not in out and not list(tmp_path.iterdir())


def test_what_is_said_of_pictures_is_true(tmp_path, monkeypatch, capsys):
    good, bad = Provider("torch", lambda: lambda x: 2 * x), Provider("torch", lambda: lambda x: x * torch.nan)

    def said(*cases: Case) -> str:
        with_cases(monkeypatch, *cases)
        run([], "cpu", results=tmp_path)
        return capsys.readouterr().out.splitlines()[-1]

    assert said(toy(good)) == f"1 picture in {tmp_path}"
    assert said(toy(good), toy(good, operation="other"), toy(bad, operation="third")) == f"2 pictures in {tmp_path}"
    assert said(toy(bad)) == "no pictures: no measurement succeeded"
    monkeypatch.setattr(report, "_can_draw", lambda: False)
    assert said(toy(good)) == "no pictures: matplotlib is not installed"


def test_what_was_measured_before_the_end_is_written(tmp_path, monkeypatch):
    """A fault that nothing can catch, in the middle of the second case."""

    def fatal(x: torch.Tensor) -> None:
        raise SystemExit("the GPU is lost")

    good = Provider("torch", lambda: lambda x: 2 * x)
    with_cases(monkeypatch, toy(good), toy(good, Provider("reference", lambda: fatal), operation="second"), toy(good))
    with pytest.raises(SystemExit, match="the GPU is lost"):
        run([], "cpu", results=tmp_path, commit="abc")
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert [(r["operation"], r["provider"], r["status"]) for r in found["rows"]] == [
        *[("toy", "torch", "ok")] * 3,
        *[("second", "torch", "ok")] * 3,
    ]
    assert found["commit"] == "abc" and found["rows"][-1]["percent_of_ceiling"] > 0


def test_no_gpu_where_one_is_asked_for_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmarks", "rotary", "--device", "cuda", "--results", str(tmp_path)])
    assert main() == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: device cuda: torch sees no GPU here\n") and not list(tmp_path.iterdir())


def test_only_the_shapes_that_were_named(tmp_path, monkeypatch):
    good = Provider("torch", lambda: lambda x: 2 * x)
    with_cases(monkeypatch, *(toy(good, shape=shape) for shape in ("8 x 64", "8 x 64 causal", "8 x 640")))
    assert run([], "cpu", results=tmp_path, shapes="x 64$") == 0
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {r["shape"] for r in found["rows"]} == {"8 x 64"}


def test_a_time_limit_leaves_what_was_measured(tmp_path, monkeypatch):
    def slow(x: torch.Tensor) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with_cases(monkeypatch, toy(Provider("torch", lambda: lambda x: 2 * x)), toy(Provider("reference", lambda: slow)))
    monkeypatch.setattr("sys.argv", ["benchmarks", "--device", "cpu", "--results", str(tmp_path)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 143
    assert {r["provider"] for r in json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]} == {"torch"}


def test_lines_over_sizes(tmp_path, monkeypatch):
    """A panel per group and direction, a line per provider."""
    pictures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: pictures.append((figure, path.name)))
    rows = [
        row(provider, 4.0 / size, direction, size=size, group=group)
        for provider, sizes in (("triton", (4, 1, 2)), ("a", (1, 2)))
        for size in sizes
        for direction in ("forward", "backward")
        for group in ("causal", "every key")
    ]
    machine = {"machine": {"gpu": "G"}, "label": "", "ceilings": {"gemm_tflops": 8.0, "copy_gb_per_second": 4000.0}}
    report.draw({**machine, **report.results([*rows, row("triton", 1.0, operation="bars")], CEILINGS)}, tmp_path)
    (figure, name), (bars, other) = pictures
    assert (name, other) == ("op.png", "bars.png")
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == ["causal\nforward", "causal\nbackward", "every key\nforward", "every key\nbackward"]
    for panel in figure.axes:
        lines = {line.get_label(): list(line.get_xdata()) for line in panel.get_lines()}
        assert (lines["triton"], lines["a"]) == ([1, 2, 4], [1, 2])
        assert [text.get_text() for text in panel.get_xticklabels()] == ["1", "2", "4"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["triton", "a", "measured ceiling"]
    assert len(bars.axes) == 1 and len(bars.axes[0].patches) == 1


def test_an_unknown_operation_is_named():
    with pytest.raises(ValueError, match="no benchmark is called rmsnorm; there are rms_norm, "):
        run(["rmsnorm"], "cpu", results=Path("nowhere"))


@pytest.mark.parametrize("sizes", ["quick", "full"])
def test_the_least_bytes_of_the_large_cases(sizes):
    """Listing cases makes no tensors; the bytes are those of docs/kernels.md."""
    found = {(case.operation, case.shape, case.dtype): case for case in find_cases(sizes=sizes)}
    elements = 16384 * 4096
    case = found["rms_norm", "16384 x 4096", torch.bfloat16]
    assert case.forward.bytes == pytest.approx(4 * elements, rel=1e-3)
    assert case.backward is not None
    assert case.backward.bytes == pytest.approx(6 * elements, rel=1e-3)
    adam = {shape.split()[1]: case for (name, shape, _), case in found.items() if name == "fused_adam"}
    per_parameter = {kept: case.forward.bytes / int(case.shape.split()[0].replace(",", "")) for kept, case in adam.items()}
    assert per_parameter == {"fp32": 28, "master": 28, "remainder": 26, "chance": 22}
    for name, logits in (("cross_entropy", 6),):
        for (operation, shape, dtype), case in found.items():
            if operation == name and dtype == torch.bfloat16:
                rows, columns = (int(text) for text in shape.split(" smooth")[0].split(" x "))
                assert case.work()["full"].bytes == logits * rows * columns
