"""Every layout computes what one rank computes; and the comparison that says so finds every planted difference."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megalm.checkpoint.sharded import write_manifest, write_pieces
from megalm.config.run import ParityConfig, ParityRun, RunConfig
from megalm.errors import ConfigError, Problem, RunError
from megalm.parallel.workers import Starter
from megalm.train import parity
from megalm.train.comparison import Comparison, compare
from megalm.train.parity import parity_command, run_config

# --- the matrix: real runs in real processes -------------------------------------------------------------------------

FP32 = ("loss_tolerance=1e-5", "norm_tolerance=1e-5", "weight_tolerance=1e-4")
# Pipeline and data parallel leave every matrix product as it is, and add up microbatches in fp32: bf16 runs keep the
# tolerances of fp32 (measured: 1e-6, 2e-7, 6e-8). Without dropout: with it GPT's key biases, which are noise (see
# docs/numerics.md), have once moved the rounding of a key after five steps (measured: loss 6e-5).
BF16 = ("train.precision=bf16", "model.dropout=0", *FP32)
# Tensor, context and expert parallel cut the products differently, which changes the order of their sums, and bf16 has 8
# bits: single activations round to the neighbouring number, 0.4 % away. In the mean over 256 tokens, and in the norm over
# 70,000 elements, most of that cancels (measured: loss 2e-4 of 4.8, norm 2e-3). A weight moves by at most lr = 1e-3 in a
# step, whatever the size of its gradient: one whose gradient is smaller than its rounding goes another way, 2e-3 apart after
# each such step (measured: 3e-3 after 20). Three to five times the measured values; a wrong slice would be off by far more.
SLICED_BF16 = (
    "train.precision=bf16", "model.dropout=0", "loss_tolerance=1e-3", "norm_tolerance=1e-2", "weight_tolerance=1e-2"
)  # fmt: skip

EXPERTS = ("model=tiny_moe", "data.document_mask=true")
DROPPING = ("model.capacity_factor=0.75",)  # the same tokens are dropped on every layout
DEEPSEEK = ("model=tiny_deepseek", "model.num_kv_heads=0", "model.num_layers=3")


def run_parity(folder: Path, layouts: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megalm.launchers.cli", "parity", f"parity.layouts=[{layouts}]"]
    done = subprocess.run(
        [*command, "parity.steps=20", *arguments], cwd=folder, capture_output=True, text=True, timeout=5000, check=False
    )
    print(done.stdout, done.stderr)
    return done


def check_table(done: subprocess.CompletedProcess[str], at_least: int) -> None:
    """Every row says that the layout is equal, and there are as many as there should be."""
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.endswith(" equal")]
    assert len(rows) >= at_least
    assert all(row[2] == "equal" for row in rows), "initial weights, to the bit"
    assert done.stdout.splitlines()[-1].startswith(f"{len(rows)} layout{'s' * (len(rows) > 1)} equal one rank over 20 steps")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize(
    ("layouts", "count", "arguments"),
    [
        # Every layout of a sample twice: the deterministic mode, to the bit. The first runs are the comparison with one rank.
        pytest.param("sample", 18, (*FP32, "parity.repeat=true"), id="llama-untied-fp32"),
        pytest.param("sample", 17, (*EXPERTS, *FP32, "parity.repeat=true"), id="experts-documents-fp32"),
        pytest.param("ep2_dp2,dp4_ep4,tp2_dp2_ep2,cp2_ring_ep2", 4, (*EXPERTS, *FP32, *DROPPING), id="experts-capacity"),
        pytest.param("dp2_ep2,tp2,cp2_ulysses,pp2_dp2_ep2_zero2_microbatch", 4, (*DEEPSEEK, *FP32), id="latents-experts"),
        pytest.param("cp2_ring,tp2_cp2_ulysses,cp2_ring_pp2", 3, ("model.window=12", *FP32), id="window"),
        pytest.param(
            "tp2_sp,pp2,pp2_zbv,pp2_dp2_zero1,pp2_dp2_zero3,cp2_ring", 6, ("model=tiny_gpt", *FP32), id="gpt-tied-fp32"
        ),
        pytest.param("pp2,dp2,dp2_zero1,dp2_zero2,dp2_zero3", 5, BF16, id="llama-bf16"),
        pytest.param("tp2_sp,tp2_pp2,cp2_ring,cp2_ulysses", 4, SLICED_BF16, id="llama-sliced-bf16"),
        # Not cp2: attention rounds otherwise there, and a token whose experts are nearly equal goes to another one.
        pytest.param("dp2_ep2", 1, (*EXPERTS, *SLICED_BF16), id="experts-sliced-bf16"),
        pytest.param("dp2,pp2_dp2_zero1,pp2_zbh1", 3, ("model=tiny_gpt", *BF16), id="gpt-tied-bf16"),
    ],
)
def test_layouts_equal_one_rank(layouts: str, count: int, arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run_parity(tmp_path, layouts, *arguments)
    check_table(done, count)
    assert ("repeated, equals itself to the bit" in done.stdout) == ("parity.repeat=true" in arguments)


@pytest.mark.dist
@pytest.mark.matrix
@pytest.mark.timeout(7200)
def test_every_legal_layout_equals_one_rank(tmp_path: Path) -> None:
    """What docs/parity.md shows; CI runs the sample of it."""
    done = run_parity(tmp_path, "all", "parity.models=[llama,gpt]", "parity.report=parity.md,parity.html", *FP32)
    check_table(done, 200)
    assert "| `tp2_sp_pp2_zbv` | 4 | equal |" in (tmp_path / "parity.md").read_text()


@pytest.mark.dist
@pytest.mark.slow
def test_runs_that_are_not_the_same_are_told_apart(tmp_path: Path) -> None:
    """A real difference: bf16 cannot keep the tolerances of fp32."""
    done = run_parity(tmp_path, "tp2", *FP32, "train.precision=bf16", "parity.keep=true")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "layout tp2" in done.stderr and "DIFFERS" in done.stdout and "Traceback" not in done.stderr
    assert (tmp_path / "runs/parity/tp2/metrics.jsonl").exists()


@pytest.mark.dist
@pytest.mark.slow
def test_records_of_layouts_that_are_right_agree(tmp_path: Path) -> None:
    """Rounding breaks tolerances of 1e-12, and no module is to blame. Key/value heads with copies, a padded vocabulary, a
    backward in two halves."""
    done = run_parity(
        tmp_path, "tp4,pp2_zbv", "model=tiny_gpt", "model.vocab_size=127", "parity.steps=2", "loss_tolerance=1e-12",
        "norm_tolerance=1e-12", "weight_tolerance=1e-12",
    )  # fmt: skip
    assert done.stderr.count("every output, its gradient and every parameter's gradient agree") == 2, done.stderr


# --- the comparison, on runs that are written by hand ----------------------------------------------------------------

STEPS = 3
NAMES = ("embedding.weight", "layers.2.mlp.up.weight", "layers.10.attention.k.bias", "layers.10.mlp.up.weight", "norm.weight")
CONFIG = ParityRun(parity=ParityConfig(["tp2"], steps=STEPS))
Change = Callable[[dict], None]


def write_run(folder: Path, change: Change = lambda run: None) -> Path:
    """What a run leaves behind, changed by `change`: {"losses", "norms", 0: first weights, 3: last weights}."""
    run: dict = {"losses": [4.0, 3.5, 3.25], "norms": [2.0, 1.0, 0.5]}
    for step in (0, STEPS):
        generator = torch.Generator().manual_seed(step)
        run[step] = {name: torch.randn(4, 3, generator=generator) for name in NAMES}
    change(run)
    for step in (0, STEPS):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        write_pieces(checkpoint, 0, {f"weight/{n}": (x, tuple(x.shape), (0,) * x.dim()) for n, x in run[step].items()})
        write_manifest(checkpoint, {}, {})
    pairs = zip(run["losses"], run["norms"], strict=True)
    records: list[dict] = [{"step": n, "loss": loss, "grad_norm": norm} for n, (loss, norm) in enumerate(pairs, 1)]
    records.insert(1, {"step": 1, "valid_loss": 9.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def compared(tmp_path: Path, change: Change) -> Comparison:
    result = Comparison("tp2", 2, 1.0)
    compare(result, write_run(tmp_path / "single"), write_run(tmp_path / "tp2", change), CONFIG.parity)
    return result


def flip_a_bit(x: torch.Tensor) -> None:
    x.view(torch.int32)[1, 2] ^= 1


def test_equal_runs(tmp_path: Path) -> None:
    result = compared(tmp_path, lambda run: None)
    assert (result.loss, result.norm, result.weight, result.initial_equal, result.faults) == (0, 0, 0, True, [])


def test_rounding_is_within_the_tolerance_and_reported(tmp_path: Path) -> None:
    def change(run: dict) -> None:
        run["losses"][1] += 9e-6
        run["norms"][2] += 4e-6  # 8e-6 of 0.5
        run[STEPS]["norm.weight"][0, 0] += 9e-5

    result = compared(tmp_path, change)
    assert result.faults == []
    assert (result.loss, result.norm, result.weight) == pytest.approx((9e-6, 8e-6, 9e-5), rel=1e-2)


@pytest.mark.parametrize(
    ("change", "message", "step"),
    [
        (
            lambda run: run[0]["layers.2.mlp.up.weight"][1].add_(1),
            "initial weights differ by 1.0e+00 in layers.2.mlp.up.weight",
            1,
        ),
        (lambda run: flip_a_bit(run[0]["norm.weight"]), "initial weights differ by", 1),
        (lambda run: run["losses"].__setitem__(1, 3.50002), "loss differs by 2.0e-05 > 1e-05 at step 2", 2),
        (lambda run: run["losses"].__setitem__(2, float("nan")), "loss differs by nan > 1e-05 at step 3", 3),
        (lambda run: run["norms"].__setitem__(2, 0.50001), "gradient norm differs by 2.0e-05 > 1e-05 at step 3", 3),
        (
            lambda run: run[STEPS]["embedding.weight"][0].add_(2e-4),
            "final weights differ by 2.0e-04 > 1e-04 in embedding.weight",
            STEPS,
        ),
        (
            lambda run: run[STEPS]["layers.10.mlp.up.weight"][0].fill_(float("nan")),
            "final weights differ by nan > 1e-04 in layers.10.mlp.up.weight",
            STEPS,
        ),
    ],
)
def test_a_planted_difference_is_found_and_named(change: Change, message: str, step: int, tmp_path: Path) -> None:
    result = compared(tmp_path, change)
    assert len(result.faults) == 1 and result.faults[0].startswith(message)
    assert (result.first_step, result.verdict) == (step, "DIFFERS")


def test_the_first_and_the_largest_are_named_in_the_order_of_the_model(tmp_path: Path) -> None:
    """Layer 2 comes before layer 10, the embedding before both, the last norm after."""

    def change(run: dict) -> None:
        for step in (0, STEPS):
            for size, name in enumerate(("norm.weight", "layers.10.mlp.up.weight", "layers.2.mlp.up.weight"), 1):
                run[step][name] += 4 - size

    assert compared(tmp_path, change).faults == [
        "initial weights differ by 3.0e+00: first in layers.2.mlp.up.weight (by 1.0e+00), most in norm.weight",
        "final weights differ by 3.0e+00 > 1e-04: first in layers.2.mlp.up.weight (by 1.0e+00), most in norm.weight",
    ]


def test_the_earlier_of_loss_and_norm_is_named_first(tmp_path: Path) -> None:
    def change(run: dict) -> None:
        run["losses"][1:] = [3.75, 4.25]
        run["norms"][0] = 2.5

    result = compared(tmp_path, change)
    assert result.first_step == 1
    assert result.faults == [
        "gradient norm differs by 2.5e-01 > 1e-05 at step 1",
        "loss differs by 1.0e+00 > 1e-05: first at step 2 (by 2.5e-01), most at step 3",
    ]


def test_the_first_may_be_the_largest(tmp_path: Path) -> None:
    faults = compared(tmp_path, lambda run: run.__setitem__("losses", [4.5, 3.75, 3.25])).faults
    assert faults == ["loss differs by 5.0e-01 > 1e-05, first and most at step 1"]


def test_the_key_bias_is_listed_apart(tmp_path: Path) -> None:
    """Its gradient is zero, so its final value is noise; its initial value is not."""
    last = compared(tmp_path / "a", lambda run: run[STEPS]["layers.10.attention.k.bias"].add_(0.5))
    assert last.faults == [] and last.weight == 0 and last.zero_gradient == pytest.approx(0.5)
    first = compared(tmp_path / "b", lambda run: run[0]["layers.10.attention.k.bias"].add_(0.5))
    assert first.faults == ["initial weights differ by 5.0e-01 in layers.10.attention.k.bias"]


@pytest.fixture
def run_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], ParityRun]:
    """`parity_command` with runs that are written instead of trained, and do not record."""

    def prepare(change: Change) -> ParityRun:
        def start(run: RunConfig, start: Starter) -> None:
            folder = Path(run.train.run_dir)
            if not run.train.record:
                write_run(folder, change if folder.name == "tp2" else lambda run: None)

        monkeypatch.setattr(parity, "start_layout", start)
        return ParityRun(parity=ParityConfig(["tp2"], steps=STEPS, work_dir=str(tmp_path / "work")))

    return prepare


def test_the_command_prints_a_table_and_cleans_up(run_by_hand, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "tp2").mkdir()
    (tmp_path / "work" / "tp2" / "metrics.jsonl").write_text("of the last time")
    parity_command(run_by_hand(lambda run: None))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["layout", "single", "tp2"]
    assert lines[1].endswith("reference") and lines[2].endswith("  equal")
    assert lines[2].split()[1:6] == ["2", "equal", "0.0e+00", "0.0e+00", "0.0e+00"]
    assert lines[-1] == "1 layout equal one rank over 3 steps"
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda run: None, ""),
        (lambda run: flip_a_bit(run[STEPS]["norm.weight"]), r"weight/norm\.weight by \d\.\de-0\d in step-00000003$"),
        (lambda run: run[0]["norm.weight"][0].mul_(-1), r"weight/norm\.weight by 0\.0e\+00 in step-00000000"),  # -0 is not 0
        (lambda run: run["losses"].__setitem__(1, 3.5000000000000004), r"loss at step 2 \(3\.5 and 3\.5000000000000004\)"),
        (lambda run: run["norms"].__setitem__(0, float("nan")), r"grad_norm at step 1 \(2\.0 and nan\)"),
    ],
)
def test_a_run_that_does_not_repeat_is_a_finding(change: Change, found: str, run_by_hand, monkeypatch, tmp_path: Path) -> None:
    """Differences that no tolerance would see."""
    config = run_by_hand(lambda run: None)
    config.parity.repeat = True

    def start(run: RunConfig, start: Starter) -> None:
        assert run.train.deterministic

        def written(run_: dict) -> None:
            run_[0]["norm.weight"][0] = 0.0
            if run.train.run_dir.endswith("tp2-again"):
                change(run_)

        write_run(Path(run.train.run_dir), written)

    monkeypatch.setattr(parity, "start_layout", start)
    if not found:
        parity_command(config)
    else:
        with pytest.raises(RunError, match=r"layout tp2\n +rule: +a second run differs: " + found):
            parity_command(config)
    assert not (tmp_path / "work").exists()


def test_a_repetition_that_fails_is_a_finding(run_by_hand, monkeypatch) -> None:
    config, written = run_by_hand(lambda run: None), parity.start_layout
    config.parity.repeat = True

    def start(run: RunConfig, start: Starter) -> None:
        if run.train.run_dir.endswith("tp2-again"):
            raise RunError(Problem("rank 1", "killed by SIGKILL", "every worker must run to the end"))
        written(run, start)

    monkeypatch.setattr(parity, "start_layout", start)
    with pytest.raises(RunError, match="did not run a second time: run error: rank 1 killed by SIGKILL"):
        parity_command(config)


def test_the_command_exits_with_1_and_names_what_differs(run_by_hand, capsys: pytest.CaptureFixture) -> None:
    def change(run: dict) -> None:
        run[0]["layers.2.mlp.up.weight"] += 1
        run["losses"][1] += 1

    with pytest.raises(RunError) as caught:
        parity_command(run_by_hand(change))
    assert caught.value.exit_code == 1
    loss = "loss differs by 1.0e+00 > 1e-05 at step 2"
    for part in ("parity error", "layout tp2", "1.0e+00 in layers.2.mlp.up.weight", loss, "no module of step 1 was recorded"):
        assert part in str(caught.value)
    assert "DIFFERS" in capsys.readouterr().out


def test_a_layout_that_does_not_run_is_a_finding_and_the_next_one_runs(run_by_hand, monkeypatch, capsys) -> None:
    config, written = run_by_hand(lambda run: None), parity.start_layout
    config.parity.layouts = ["pp2", "tp2"]

    def start(run: RunConfig, start: Starter) -> None:
        if run.parallel.pipeline_parallel > 1:
            raise RunError(Problem("rank 1", "killed by SIGKILL", "every worker must run to the end"))
        written(run, start)

    monkeypatch.setattr(parity, "start_layout", start)
    with pytest.raises(RunError, match="did not run: run error: rank 1 killed by SIGKILL: every worker") as caught:
        parity_command(config)
    assert [problem.key for problem in caught.value.problems] == ["layout pp2"]
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[2:]] == ["FAILED", "equal"]


def test_a_reference_that_does_not_run_is_the_error(run_by_hand, monkeypatch) -> None:
    config = run_by_hand(lambda run: None)

    def start(run: RunConfig, start: Starter) -> None:
        raise RunError(Problem("rank 0", "killed by SIGKILL", "every worker must run to the end"))

    monkeypatch.setattr(parity, "start_layout", start)
    with pytest.raises(RunError, match=r"^run error"):
        parity_command(config)


def test_a_repetition_that_does_not_run_is_said(run_by_hand, monkeypatch) -> None:
    config, written = run_by_hand(lambda run: run["losses"].__setitem__(0, 9.0)), parity.start_layout

    def start(run: RunConfig, start: Starter) -> None:
        if run.train.record:
            raise RunError(Problem("rank 0", None, "out of memory"))
        written(run, start)

    monkeypatch.setattr(parity, "start_layout", start)
    with pytest.raises(RunError, match="could not be repeated to find the module: run error: rank 0 : out of memory"):
        parity_command(config)


def test_several_models_are_told_apart(run_by_hand, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = run_by_hand(lambda run: run["losses"].__setitem__(0, 9.0))
    config.parity.models = ["llama", "gpt"]
    report = tmp_path / "reports" / "parity.md"
    config.parity.report = f"{report}, {report.with_suffix('.html')}"
    with pytest.raises(RunError) as caught:
        parity_command(config, "megalm parity typed")
    assert [problem.key for problem in caught.value.problems] == ["layout tp2 of llama", "layout tp2 of gpt"]
    titles = [line for line in capsys.readouterr().out.splitlines() if line.endswith("1 layout")]
    assert titles == ["llama, 1 layout", "gpt, 1 layout"]
    text = report.read_text()
    assert "## llama" in text and "## gpt" in text and "`megalm parity typed`" in text and "0 of 2 layouts" in text
    assert re.search(r"\| `tp2` \| 2 \| equal \| 5.0e\+00 \| 0.0e\+00 \|.*\| DIFFERS \|", text)
    page = report.with_suffix(".html").read_text()
    assert page.count('<td class="over">5.0e+00') == 2 and "loss differs by 5.0e+00" in page and "http" not in page


def test_keep_keeps_the_runs(run_by_hand, tmp_path: Path) -> None:
    config = run_by_hand(lambda run: None)
    config.parity.keep = True
    parity_command(config)
    assert (tmp_path / "work" / "tp2" / "metrics.jsonl").exists()
    shutil.rmtree(tmp_path / "work")


@pytest.mark.parametrize(
    ("layout", "part"), [("tp2_x", "cannot read 'x'"), ("tp0", "tensor_parallel = 0"), ("zero7", "zero = 7")]
)
def test_a_layout_that_cannot_be_read(layout: str, part: str) -> None:
    with pytest.raises(ConfigError, match=r"parity\.layouts") as caught:
        run_config(CONFIG, layout, Path("work"))
    assert part in str(caught.value)


def test_every_layout_that_cannot_run_is_named_before_anything_runs(tmp_path: Path) -> None:
    config = ParityRun(parity=ParityConfig(["tp3", "pp8", "tp2"], steps=STEPS, work_dir=str(tmp_path / "work")))
    with pytest.raises(ConfigError) as caught:
        parity_command(config)
    keys = {problem.key.split("]")[0] + "]" for problem in caught.value.problems}
    assert keys == {"[tp3]", "[pp8]"}
    assert not (tmp_path / "work").exists()


def test_the_runs_differ_in_their_layout_only() -> None:
    single, other = (run_config(CONFIG, name, Path("work")) for name in ("single", "tp2_pp2_dp2_zero2"))
    assert (other.parallel.tensor_parallel, other.parallel.pipeline_parallel, other.parallel.zero) == (2, 2, 2)
    assert (single.cluster.num_processes, other.cluster.num_processes) == (1, 8)
    assert single.model == other.model and single.optim == other.optim and single.data == other.data
    assert single.checkpoint.save_first and single.checkpoint.keep == 0 and single.train.steps == STEPS
