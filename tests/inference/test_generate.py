"""Generation: the cache changes nothing, the seed everything, and each mistake has its message."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import megalm_kernels
from megalm.checkpoint.sharded import publish, read_manifest, write_manifest, write_pieces
from megalm.checkpoint.state import BUFFER, RunState, save_checkpoint
from megalm.config.data import DataConfig
from megalm.config.model import ModelConfig
from megalm.config.parallel import ParallelConfig
from megalm.config.run import RunConfig
from megalm.config.tasks import GenerateConfig
from megalm.data.tokenizer import Tokenizer
from megalm.errors import CheckpointError, ConfigError, DataError
from megalm.inference.cache import GrowingCache
from megalm.inference.generate import check_prompt, find_device, find_tokenizer, generate, generate_command, load_model
from megalm.inference.sampling import draw_token
from megalm.models.attention import CausalAttention
from megalm.models.decoder import Decoder
from megalm.models.init import initial_value
from megalm.models.registry import build_model
from megalm.parallel.topology import build_topology
from megalm.testing import run_distributed
from megalm.train.build import build_engine, build_stage
from megalm_kernels import decode_attention

VOCAB, NO_END = 260, -1


LATENT = {"kv_latent_size": 12, "q_latent_size": 10, "rope_head_dim": 2, "value_head_dim": 3}
VARIANTS: dict[str, dict[str, float]] = {
    "window": {"window": 5, "num_kv_heads": 2},
    "latent": LATENT,
    "latent window": {**LATENT, "window": 5},
    "experts": {"num_experts": 4, "expert_ffn_size": 16, "capacity_factor": 0.5},
}


def shape(name: str, tied: bool = False) -> ModelConfig:
    """An architecture, or a llama with one of the variants."""
    parts = VARIANTS.get(name, {"num_kv_heads": 2} if name == "llama" else {})
    architecture = "gpt" if name == "gpt" else "llama"
    return ModelConfig(architecture, VOCAB, 16, 2, 4, max_seq_length=32, tie_embeddings=tied, **parts)  # type: ignore[arg-type]


def fresh(architecture: str, tied: bool = False) -> Decoder:
    """A model with the weights of step 0."""
    config = shape(architecture, tied)
    model = build_model(config)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(initial_value(name, tuple(parameter.shape), config, 1234))
    for balance in model.buffers():
        balance.copy_(torch.linspace(-0.2, 0.2, balance.numel()))
    return model.eval().requires_grad_(False)


def sharp(architecture: str) -> Decoder:
    """A model whose choices depend on the context: weights ten times as large."""
    model = fresh(architecture)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(10)
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer.train(["def f(x): return x\n"] * 5, VOCAB).save(path)
    return path


def save(root: Path, architecture: str, data: DataConfig | None = None, tied: bool = False) -> Path:
    """A run folder with a checkpoint as one process writes it."""
    config = asdict(RunConfig(model=shape(architecture, tied), data=data or DataConfig()))
    temporary = root / "checkpoints" / ".tmp"
    temporary.mkdir(parents=True)
    model = fresh(architecture, tied)
    tensors = {f"weight/{name}": p for name, p in model.named_parameters()}
    tensors |= {f"{BUFFER}/{name}": buffer for name, buffer in model.named_buffers()}
    write_pieces(temporary, 0, {key: (x, tuple(x.shape), (0,) * x.dim()) for key, x in tensors.items()})
    write_manifest(temporary, asdict(RunState()), config)
    publish(temporary, root / "checkpoints" / "step-00000000")
    return root


@pytest.mark.parametrize("architecture", ["gpt", "llama", *VARIANTS])
@pytest.mark.parametrize("greedy", [True, False])
def test_the_cache_changes_nothing(architecture: str, greedy: bool) -> None:
    """Token by token equal to running the whole sequence again for each."""
    model, config = sharp(architecture), GenerateConfig(max_tokens=20, greedy=greedy, temperature=0.7, top_k=50, top_p=0.9)
    prompt = [5, 9, 200, 3]
    found, generator, tokens = list(generate(model, prompt, config, 11, NO_END)), torch.Generator().manual_seed(11), prompt
    for _ in range(20):
        logits = model(torch.tensor([tokens]))[:, -1]
        tokens = [*tokens, int(draw_token(logits, greedy, 0.7, 50, 0.9, generator))]
    assert found == tokens[4:]
    assert len(set(found)) > 5, "a model that repeats itself would hide a fault of the cache"


@pytest.mark.parametrize("variant", ["window", "latent window"])
def test_a_window_hides_what_is_far_behind(variant: str) -> None:
    """Two layers see 5 + 5 tokens back: another token before that changes nothing, one within changes the logits."""
    model, tokens = sharp(variant), torch.arange(3, 23)[None]
    cache = GrowingCache(20)
    model(tokens[:, :19], torch.arange(19), cache=cache)
    last = model(tokens[:, 19:], torch.tensor([19]), cache=cache)
    for place, equal in ((8, True), (9, False)):
        other, cache = tokens.clone(), GrowingCache(20)
        other[0, place] = 200
        model(other[:, :19], torch.arange(19), cache=cache)
        found = model(other[:, 19:], torch.tensor([19]), cache=cache)
        assert torch.equal(found, last) is equal, place


def test_the_kernel_for_decoding_has_the_same_window() -> None:
    """What a token sees through `model.window` is what `decode_attention` shows it with window_left."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 20, heads, 8, generator=generator) for heads in (4, 2, 2))
    for window in (1, 5, 30):
        whole = CausalAttention(window)(q, k, v, None)
        found = decode_attention(q[:, -2:], k, v, window_left=window)
        torch.testing.assert_close(found, whole[:, -2:], rtol=1e-5, atol=1e-6)


def test_the_seed_decides() -> None:
    model, config = sharp("llama"), GenerateConfig(max_tokens=10, temperature=1.5)
    runs = [list(generate(model, [1, 2], config, seed, NO_END)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    model, config = sharp("llama"), GenerateConfig(max_tokens=30, temperature=5.0, top_p=1.0)
    assert max(generate(model, [1, 2], config, 0, NO_END)) >= 9 > max(generate(model, [1, 2], config, 0, NO_END, 9))


def test_it_stops_at_the_end_of_the_document() -> None:
    model, config = sharp("llama"), GenerateConfig(max_tokens=12, greedy=True)
    tokens = list(generate(model, [1, 2], config, 0, NO_END))
    end = tokens[6]
    assert list(generate(model, [1, 2], config, 0, end)) == tokens[: tokens.index(end)]


@pytest.mark.parametrize("architecture", ["gpt", "llama", "experts"])
@pytest.mark.parametrize("tied", [False, True])
def test_loaded_is_what_was_saved(architecture: str, tied: bool, tmp_path: Path) -> None:
    folder = save(tmp_path, architecture, tied=tied) / "checkpoints" / "step-00000000"
    model = load_model(folder, read_manifest(folder), torch.device("cpu"))
    tokens = torch.arange(9)[None]
    original = fresh(architecture, tied)
    assert torch.equal(model(tokens), original(tokens))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), original.buffers(), strict=True))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert (model.head.weight is model.embedding.weight) is tied


def write_split(rank: int, world_size: int, root: str, tied: bool) -> None:
    parallel = ParallelConfig(tensor_parallel=2, sequence_parallel=True)
    config = RunConfig(model=shape("llama", tied), parallel=parallel)
    topology = build_topology(parallel, torch.device("cpu"))
    stage = build_stage(config, topology, 0, 1, torch.float32)
    engine = build_engine(config, topology, torch.nn.ModuleList([stage]))
    dist.barrier()
    save_checkpoint(Path(root), engine, RunState(), asdict(config), 0)


@pytest.mark.dist
@pytest.mark.parametrize("tied", [False, True])
def test_one_process_generates_from_what_two_tensor_parallel_ones_wrote(
    tied: bool, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture
) -> None:
    run_distributed(write_split, 2, str(tmp_path / "two" / "checkpoints"), tied)
    save(tmp_path / "one", "llama", tied=tied)
    texts = []
    for run in ("one", "two"):
        config = GenerateConfig(str(tmp_path / run), str(tokenizer), "def f", 24, samples=2, temperature=1.2, seed=5)
        generate_command(config)
        lines = capsys.readouterr().out.split("\n", 1)[1]
        texts.append(lines.rsplit("---", 1)[0])
    assert texts[0] == texts[1]
    assert texts[0].count("def f") >= 2 and "--- sample 2" in texts[0]
    one, two = texts[0].split("--- sample 2\n")
    assert one.removeprefix("--- sample 1\n").strip() != two.strip(), "each sample has a seed of its own"


def test_the_choice_of_kernels_knows_the_model(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(megalm_kernels, "choose", lambda *arguments, **facts: asked.append((arguments, facts)))
    run = save(tmp_path / "a", "gpt", DataConfig(path=str(tokenizer.parent / "corpus")))
    generate_command(GenerateConfig(str(run), "", "def ", 3, device="cpu"))
    assert asked == [(("auto", "cpu"), {"facts": {"head_dim": 4, "precision": "fp32"}})]


def test_it_finds_the_tokenizer_of_the_run(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture) -> None:
    run = save(tmp_path / "a", "gpt", DataConfig(path=str(tokenizer.parent / "corpus")))
    generate_command(GenerateConfig(str(run), "", "def ", 3))
    named = save(tmp_path / "b", "gpt", DataConfig(path="elsewhere/corpus", tokenizer=str(tokenizer)))
    generate_command(GenerateConfig(str(named), "", "def ", 3))
    assert capsys.readouterr().out.count("def ") == 2


def test_the_runs_own_copy_comes_first(tmp_path: Path, tokenizer: Path) -> None:
    """The corpus may have been made anew since, with another vocabulary."""
    run = save(tmp_path / "run", "gpt", DataConfig(path=str(tmp_path / "gone" / "corpus")))
    (run / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    folder = run / "checkpoints" / "step-00000000"
    assert find_tokenizer(GenerateConfig(), read_manifest(folder), folder).encode("def ")


def test_missing_tokenizer(tmp_path: Path) -> None:
    folder = save(tmp_path, "gpt", DataConfig(path=str(tmp_path / "corpus"))) / "checkpoints" / "step-00000000"
    with pytest.raises(DataError, match="which is not there") as caught:
        find_tokenizer(GenerateConfig(), read_manifest(folder), folder)
    assert str(tmp_path / "tokenizer.json") in str(caught.value) and "generate.tokenizer=" in str(caught.value)


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="train first"):
        generate_command(GenerateConfig(str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "key", "fix"),
    [
        ([], 4, "generate.prompt", "generate.prompt='def '"),
        ([3, VOCAB], 4, "generate.tokenizer", "the tokenizer that the run was trained with"),
        ([3] * 30, 3, "generate.max_tokens", "generate.max_tokens=2"),
        ([3] * 32, 1, "generate.prompt", "a shorter generate.prompt"),
        ([3] * 40, 1, "generate.prompt", "a shorter generate.prompt"),
    ],
)
def test_prompts_that_cannot_be(prompt: list[int], max_tokens: int, key: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_prompt(prompt, GenerateConfig(max_tokens=max_tokens), shape("gpt"))
    (problem,) = caught.value.problems
    assert (problem.key, problem.fix) == (key, fix)


def test_prompts_that_just_fit() -> None:
    check_prompt([VOCAB - 1] * 30, GenerateConfig(max_tokens=2), shape("gpt"))
    assert len(list(generate(sharp("gpt"), [1] * 30, GenerateConfig(max_tokens=2, greedy=True), 0, NO_END))) == 2


def test_a_gpu_that_is_not_there_is_not_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        find_device("cuda")
