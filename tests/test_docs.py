"""The pages are true where a machine can tell: links lead somewhere, commands would run, tables list what there is."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megalm.checkpoint.sharded import write_manifest, write_pieces
from megalm.config.reference import combinations
from megalm.config.run import ROOTS
from megalm.errors import ConfigError
from megalm.launchers.check import check
from megalm.launchers.cli import VERBS
from megalm.parallel.schedules import one_forward_one_backward

ROOT = Path(__file__).resolve().parents[1]
LINKS = runpy.run_path(str(ROOT / "tools" / "links.py"))
GENERATED = {Path("docs/configuration.md")}  # tests/config/test_reference.py
PAGES = [page for page in LINKS["find_pages"](ROOT) if page not in GENERATED]
LAUNCHER = re.compile(r"(?:^|&& )(?:\w+=\S+ )*(megalm|torchrun|srun|python -m megalm\.launchers\.\w+) ")
PLACEHOLDERS = {"VERB", "..."}


def blocks_of(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language; a yaml block begins with its file's name: `# mine.yaml`."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands_of(text: str) -> Iterator[str]:
    """The lines of fenced blocks and the inline code that start megalm; lines that end in a backslash are joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in [*lines, *inline]:
        if LAUNCHER.search(line) and "megalm" in line and not PLACEHOLDERS & set(line.split()):
            yield line


def read_command(line: str) -> tuple[int, list[str]]:
    """(processes that a launcher starts, 0 without one; the verb and its arguments) of a command line."""
    words = shlex.split(line, comments=True)
    while "=" in words[0]:  # NAME=value in front of a command
        words = words[1:]
    options = {key: value for key, _, value in (word.partition("=") for word in words)}
    started = {
        "torchrun": int(options.get("--nnodes", "1")) * int(options.get("--nproc-per-node", "1")),
        "srun": int(options.get("--ntasks", "1")),
    }.get(words[0], 0)
    module = next((i for i, word in enumerate(words) if word.startswith("megalm.launchers.")), None)
    if module is not None:
        return started, [words[module].rpartition(".")[2], *words[module + 1 :]]
    return started, words[words.index("megalm") + 1 :]


def check_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises ConfigError or AssertionError if this command line could not run on a machine that is large enough."""
    processes, (verb, *arguments) = read_command(line)
    if processes:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(processes))
    if verb == "check":
        verb, *arguments = arguments or ["--help"]
    if verb in ("--help", "--version"):
        return
    assert verb in VERBS, f"no verb {verb}: {line}"
    arguments = [argument for argument in arguments if argument not in ("--help", "-h")]
    if verb in ROOTS:
        check(verb, arguments)


COMMANDS = [(page, line) for page in PAGES for line in commands_of((ROOT / page).read_text(encoding="utf-8"))]


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU, no launcher, and a folder with nothing in it but the yaml files that the pages show."""
    for page in PAGES:
        for block in blocks_of(page, "yaml"):
            (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def test_every_link_leads_somewhere():
    assert LINKS["check_links"](ROOT) == [], "moved lines: python tools/links.py --fix"


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda value: str(value))
def test_every_command_would_run(page: Path, line: str, monkeypatch: pytest.MonkeyPatch):
    check_command(line, monkeypatch)


def test_the_commands_are_found():
    assert {page.name for page, _ in COMMANDS} >= {"README.md", "checkpoints.md", "numerics.md"}
    assert {read_command(line)[1][0] for _, line in COMMANDS} >= set(VERBS), "a verb has no example"


@pytest.mark.parametrize(
    "line",
    [
        "megalm pretain model=tiny",
        "megalm pretrain model.hidden=3",
        "megalm pretrain model=gpt5",
        "megalm pretrain parallel.tensor_parallel=3",
        "megalm check pretrain model.hidden=3",
        "torchrun --nproc-per-node=3 -m megalm.launchers.pretrain parallel=tp2",
        "srun --ntasks=3 python -m megalm.launchers.pretrain parallel=tp2",
    ],
)
def test_a_wrong_command_is_found(line: str, monkeypatch: pytest.MonkeyPatch):
    assert list(commands_of(f"```\n{line}\n```\n")) == [line] == list(commands_of(f"see `{line}`"))
    with pytest.raises((ConfigError, AssertionError)):
        check_command(line, monkeypatch)


def test_right_commands_pass(monkeypatch: pytest.MonkeyPatch):
    check_command("torchrun --nproc-per-node=4 -m megalm.launchers.pretrain parallel=tp2  # two copies", monkeypatch)
    check_command("OMP_NUM_THREADS=1 megalm pretrain --help", monkeypatch)
    assert list(commands_of("`megalm VERB key=value`, `megalm prepare ...`, `megalm` and `pip install megalm`")) == []


def test_the_readme_lists_every_verb():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"| `{verb}` |" not in readme] == []


def test_the_snippets_are_python():
    snippets = [(page, block) for page in PAGES for block in blocks_of(page, "python")]
    assert snippets
    for page, block in snippets:
        compile(block, str(page), "exec")


def test_the_reader_of_checkpoints_reads(tmp_path: Path):
    folder, name, whole = tmp_path / "runs/a/checkpoints/step-00000200", "weight/layers.0.attention.q.weight", torch.randn(4, 3)
    folder.mkdir(parents=True)
    for rank, rows in enumerate(whole.split(2)):
        write_pieces(folder, rank, {name: (rows, (4, 3), (2 * rank, 0))})
    write_manifest(folder, {"step": 200}, {})
    (snippet,) = blocks_of(Path("docs/checkpoints.md"), "python")
    (tmp_path / "reader.py").write_text(snippet)
    assert torch.equal(runpy.run_path("reader.py")["tensor"], whole)


def test_the_example_schedule_is_the_real_one():
    page = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    for rank, actions in enumerate(one_forward_one_backward(2, 4).actions):
        assert f"rank {rank}   {' '.join(map(str, actions))}\n" in page


def test_the_table_of_what_goes_together_is_the_rules():
    assert combinations() in (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")


def test_pages_are_plain_ascii():
    assert [page for page in PAGES if not (ROOT / page).read_text(encoding="utf-8").isascii()] == []
