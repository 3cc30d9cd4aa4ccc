"""Continue a prompt on one process, from a checkpoint that any layout wrote."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import megalm_kernels
from megalm.checkpoint.reshard import read_whole
from megalm.checkpoint.sharded import Manifest, find_checkpoint, read_manifest
from megalm.checkpoint.state import BUFFER
from megalm.config.model import ModelConfig
from megalm.config.tasks import GenerateConfig
from megalm.data.tokenizer import Tokenizer
from megalm.errors import ConfigError, DataError, Problem
from megalm.inference.cache import GrowingCache, next_positions
from megalm.inference.sampling import draw_token
from megalm.log import log
from megalm.models.decoder import Decoder
from megalm.models.registry import build_model


def generate_command(config: GenerateConfig) -> None:
    """Print the continuations. Raises MegalmError if the checkpoint, the tokenizer or the prompt cannot be used."""
    folder = find_checkpoint(Path(config.checkpoint), "generate.checkpoint")
    manifest = read_manifest(folder)
    tokenizer = find_tokenizer(config, manifest, folder)
    device = find_device(config.device)
    model = load_model(folder, manifest, device)
    megalm_kernels.choose("auto", device.type, facts={"head_dim": model.config.head_dim, "precision": "fp32"})
    prompt = tokenizer.encode(config.prompt)
    check_prompt(prompt, config, model.config)
    size = sum(p.numel() for p in model.parameters())
    log(
        f"{folder}: step {manifest.state['step']}, {model.config.architecture} with {size:,} parameters"
    )
    start, count = time.perf_counter(), 0
    for sample in range(config.samples):
        tokens = list(generate(model, prompt, config, config.seed + sample, tokenizer.eod_id, tokenizer.vocab_size))
        count += len(tokens)
        log(f"--- sample {sample + 1}\n{tokenizer.decode([*prompt, *tokens])}")
    log(f"--- {count} tokens, {count / (time.perf_counter() - start):.1f} tokens/s on {device.type}")


def find_device(wanted: str) -> torch.device:
    """The device to run on. Raises ConfigError if a GPU is asked for and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(Problem("generate.device", wanted, "torch sees no GPU here", "auto, cpu", "generate.device=auto"))
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def load_model(folder: Path, manifest: Manifest, device: torch.device) -> Decoder:
    """The whole model in fp32, in evaluation mode."""
    with torch.device("meta"):
        model = build_model(ModelConfig(**manifest.config["model"]))
    weights = {name: read_whole(folder, manifest, f"weight/{name}").to(device) for name, _ in model.named_parameters()}
    weights |= {name: read_whole(folder, manifest, f"{BUFFER}/{name}").to(device) for name, _ in model.named_buffers()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie()
    return model.eval().requires_grad_(False)


def find_tokenizer(config: GenerateConfig, manifest: Manifest, folder: Path) -> Tokenizer:
    """The one that is named, else the run's own copy beside `checkpoints/`, else the one it was trained with."""
    if config.tokenizer:
        return Tokenizer.load(config.tokenizer)
    own, data = folder.parent.parent / "tokenizer.json", manifest.config["data"]
    path = own if own.is_file() else Path(data["tokenizer"] or Path(data["path"]).parent / "tokenizer.json")
    if not path.is_file():
        rule = f"the run was trained with {path}, which is not there"
        raise DataError(Problem("generate.tokenizer", "", rule, "", "generate.tokenizer=PATH/tokenizer.json"))
    return Tokenizer.load(path)


def check_prompt(prompt: list[int], config: GenerateConfig, model: ModelConfig) -> None:
    """Raise ConfigError if the prompt is empty or does not leave room for `max_tokens`."""
    if not prompt:
        raise ConfigError(
            Problem(
                "generate.prompt", repr(config.prompt), "must hold at least one token", "", "generate.prompt='def '"
            )
        )
    if max(prompt) >= model.vocab_size:
        rule = f"the tokenizer gives id {max(prompt)}, the model has {model.vocab_size} rows"
        raise ConfigError(
            Problem("generate.tokenizer", config.tokenizer, rule, "", "the tokenizer that the run was trained with")
        )
    room = model.max_seq_length - len(prompt)
    rule = f"prompt ({len(prompt)} tokens) and continuation must fit model.max_seq_length = {model.max_seq_length}"
    if room < 1:
        fix = "a shorter generate.prompt"
        raise ConfigError(Problem("generate.prompt", f"{config.prompt[:20]!r}...", rule, f"< {model.max_seq_length} tokens", fix))
    if config.max_tokens > room:
        fix = f"generate.max_tokens={room}"
        raise ConfigError(Problem("generate.max_tokens", config.max_tokens, rule, f"<= {room}", fix))


@torch.no_grad()
def generate(
    model: Decoder, prompt: list[int], config: GenerateConfig, seed: int, eod_id: int, vocab_size: int | None = None
) -> Iterator[int]:
    """Token ids after the prompt, one by one; ends at the end-of-document token or after `max_tokens`.

    Ids from `vocab_size` on, which a padded model has and its tokenizer has not, are never drawn.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    cache = GrowingCache(len(prompt) + config.max_tokens)
    tokens = torch.tensor([prompt], device=device)
    for _ in range(config.max_tokens):
        logits: Tensor = model(tokens, next_positions(cache, tokens.shape[1], device), cache=cache)[:, -1, :vocab_size]
        token = draw_token(logits, config.greedy, config.temperature, config.top_k, config.top_p, generator)
        if int(token) == eod_id:
            return
        yield int(token)
        tokens = token[:, None]
