"""Mistakes planted in real runs: parity turns red for each, and names the place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# layout: (the mistake that its ranks make, what the report says first, where it says the runs part)
PLANTED = {
    "tp2": ("bias_on_every_rank", "loss differs", r"layers\.0\.attention\.out \(forward\)"),
    "tp2_sp": ("norm_gradient_not_summed", "gradient norm differs", r"norm\.weight \(gradient of the parameter\)"),
    "pp2": ("tied_gradient_not_summed", "gradient norm differs", r"embedding\.weight \(gradient of the parameter\)"),
    "dp2_zero1": ("loss_not_scaled_for_zero", "gradient norm differs", r"norm\.weight \(gradient of the parameter\), by 5.0e-01"),
    "pp2_interleaved": ("chunks_in_the_wrong_order", "loss differs", r"layers\.1\.attention_norm \(forward\)"),
    "pp2_gpipe": ("norm_of_one_stage", "gradient norm differs", r"comes after the backward: the norm of the gradients"),
}

# the same with experts, and with documents that do not see each other
PLANTED_IN_EXPERTS = {
    "cp2_ring": ("merge_without_lse", "loss differs", r"layers\.0\.attention\.out \(forward\)"),
    "cp2_ulysses": ("positions_of_the_rank", "gradient norm differs", r"layers\.0\.attention\.out \(forward\)"),
    "cp2_ring_zero1": ("tokens_not_in_zigzag_order", "loss differs", r"layers\.0\.attention\.out \(forward\)"),
    "tp2": ("router_gradient_not_summed", "gradient norm differs", r"mlp\.router\.weight \(gradient of the parameter\)"),
    "dp2_ep2": ("expert_gradient_over_all_copies", "gradient norm differs", r"mlp\.experts\.\w+ \(gradient of the parameter\)"),
}
SUITES = {"dense": (("model=tiny_gpt",), PLANTED), "experts": (("model=tiny_moe", "data.document_mask=true"), PLANTED_IN_EXPERTS)}

DRIVER = """
import sys
from pathlib import Path
import planted_bugs
from megalm.launchers.compose import inspect, parse
from megalm.parallel.forked import Fork
from megalm.train.parity import PRELOAD, parity_command

BUGS = dict(pair.split("=") for pair in sys.argv[2].split())

def start(module, arguments, environ, log_file):
    layout = Path(arguments[0]).stem.partition("-step-")[0]
    first = [getattr(planted_bugs, BUGS[layout])] if layout in BUGS else []
    return Fork(PRELOAD, first)(module, arguments, environ, log_file)

layouts = f"parity.layouts=[{','.join(BUGS)}]"
config, problems = inspect(parse("parity", [*sys.argv[1].split(), "steps=6", layouts]))
assert not problems, problems
parity_command(config, start=start)
"""


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict[str, str]]:
    """What is planted, and {layout: what parity says of it}, of one run with a mistake in every layout."""
    arguments, planted = SUITES[request.param]
    here, folder = Path(__file__).parent, tmp_path_factory.mktemp("planted")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])}
    pairs = " ".join(f"{layout}={bug}" for layout, (bug, *_) in planted.items())
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, " ".join(arguments), pairs], cwd=folder, env=environ, capture_output=True, text=True,
        timeout=900, check=False,
    )  # fmt: skip
    print(done.stdout, done.stderr)
    found = re.findall(r"^\d+\. layout (\w+)\n  rule:    (.*)$", done.stderr.partition("parity error")[2], re.MULTILINE)
    return planted, dict(found)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("suite", "layout"),
    [(name, layout) for name, (_, planted) in SUITES.items() for layout in planted],
    indirect=["suite"],
    scope="module",
)
def test_a_planted_bug_is_found_and_named(layout: str, suite: tuple[dict, dict[str, str]]) -> None:
    planted, reports = suite
    _, said_first, place = planted[layout]
    report = reports[layout]
    assert report.startswith(said_first), report
    assert re.search(place, report), report
