"""A step is what the textbook says, the numbers of an evaluation are right by hand, and a bad loss ends the run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megalm.checkpoint.sharded import find_checkpoint, read_manifest
from megalm.data.corpus import open_corpus
from megalm.errors import RunError
from megalm.inference.generate import load_model
from megalm.models.init import initial_value
from megalm.models.registry import build_model
from megalm.optim.schedule import learning_rate
from megalm.train.pretrain import pretrain
from megalm.train.trainer import StepResult, check_finite


def test_the_loss_falls_below_the_unigram_entropy(make, records) -> None:
    config = make("run", {"train.steps": 60})
    pretrain(config)
    losses = [record["loss"] for record in records(config)]
    entropy = open_corpus(config.data, 300).unigram_entropy
    assert losses[0] == pytest.approx(math.log(300), rel=0.02), "before the first step the model knows nothing"
    assert entropy is not None and sum(losses[-5:]) / 5 < 0.6 * entropy


@pytest.mark.parametrize("changes", [{}, {"model.tie_embeddings": True, "optim.clip": 0.3, "train.micro_batch_size": 2}])
def test_as_a_plain_loop_in_torch_does_it(changes: dict, make, records) -> None:
    """The whole batch at once, torch's AdamW and clipping, and no code of ours but the model and the data."""
    config = make("run", {"train.steps": 12, **changes})
    pretrain(config)
    model, data = build_model(config.model), open_corpus(config.data, 300).train
    for name, parameter in model.named_parameters():
        parameter.data.copy_(initial_value(name, tuple(parameter.shape), config.model, config.train.seed))
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() >= 2) == matrix], "weight_decay": decay}
        for matrix, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(config.optim.beta1, config.optim.beta2), eps=config.optim.eps)
    for step, record in enumerate(records(config)):
        rows = torch.stack([torch.from_numpy(data.sample(n)) for n in range(4 * step, 4 * step + 4)])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.optim, 12)
        optimizer.step()
        optimizer.zero_grad()
        assert record["loss"] == pytest.approx(loss.item(), abs=2e-5), f"step {step + 1}"
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=2e-4), f"step {step + 1}"
        assert record["lr"] == group["lr"]


def test_the_split_into_microbatches_does_not_matter(make, records) -> None:
    found = []
    for size in (1, 4):
        config = make(f"run{size}", {"train.micro_batch_size": size, "model.dropout": 0.2})
        pretrain(config)
        found.append([record["loss"] for record in records(config)])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_evaluation_by_hand(make, records) -> None:
    """Loss, perplexity and bits per byte of the last evaluation, from the weights that were saved."""
    config = make("run", {"train.eval_every": 10, "model.dropout": 0.3, "train.eval_samples": 6, "train.micro_batch_size": 4})
    pretrain(config)
    evaluations = records(config, "valid_loss")
    assert [record["step"] for record in evaluations] == [10, 20]
    folder = find_checkpoint(Path(config.train.run_dir))
    model = load_model(folder, read_manifest(folder), torch.device("cpu")).double()
    corpus = open_corpus(config.data, 300)
    assert corpus.valid is not None and corpus.tokenizer is not None
    rows = torch.stack([torch.from_numpy(corpus.valid.sample(n)) for n in range(8)])  # 6, rounded up to batches of 4
    nats = float(F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    text = "".join(corpus.tokenizer.decode([token]) for token in rows[:, 1:].flatten().tolist())  # the corpus is ASCII
    last = evaluations[-1]
    assert last["valid_loss"] == pytest.approx(nats / (8 * 16), abs=1e-5)
    assert last["valid_perplexity"] == math.exp(last["valid_loss"])
    assert last["valid_bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-4)


def test_evaluation_does_not_disturb_the_training(make, records) -> None:
    losses = []
    for every in (0, 3):
        config = make(f"run{every}", {"train.eval_every": every, "model.dropout": 0.2})
        pretrain(config)
        losses.append([record["loss"] for record in records(config)])
    assert losses[0] == losses[1]


def test_without_a_tokenizer_there_are_no_bits_per_byte(make, records, corpus, tmp_path) -> None:
    for end in (".bin", ".idx"):
        (tmp_path / f"bare{end}").write_bytes(Path(f"{corpus}{end}").read_bytes())
    config = make("run", {"data.path": str(tmp_path / "bare"), "train.eval_every": 10, "train.steps": 10})
    pretrain(config)
    (record,) = records(config, "valid_loss")
    assert record["valid_bits_per_byte"] is None and record["valid_perplexity"] == math.exp(record["valid_loss"])


@pytest.mark.parametrize(("loss", "norm"), [("nan", "1"), ("inf", "1"), ("1", "nan"), ("1", "inf")])
def test_numbers_that_are_not_finite(loss: str, norm: str) -> None:
    with pytest.raises(RunError, match=r"step 7\n.*must stay finite") as caught:
        check_finite(7, StepResult(torch.tensor(float(loss)), torch.tensor(float(norm)), 0.1))
    assert "optim.lr" in str(caught.value)
    assert check_finite(7, StepResult(torch.tensor(2.0), torch.tensor(3.0), 0.1)) == (2.0, 3.0)


def test_a_loss_that_explodes_ends_the_run_and_keeps_the_last_checkpoint(make, records) -> None:
    config = make("run", {"checkpoint.save_every": 1, "optim.warmup_steps": 0, "optim.lr": 1e30, "optim.clip": 0.0})
    with pytest.raises(RunError, match=r"step [23]\n"):
        pretrain(config)
    good = len(records(config))
    assert good in (1, 2) and all(math.isfinite(record["loss"]) for record in records(config))
    assert read_manifest(find_checkpoint(Path(config.train.run_dir))).state["step"] == good


def test_a_skipped_step_of_fp16_is_no_failure() -> None:
    loss, overflow = torch.tensor(2.0), torch.tensor(torch.inf)
    assert check_finite(7, StepResult(loss, overflow, 0.1, True, 1024.0)) == (2.0, torch.inf)
    for result in (
        StepResult(loss, overflow, 0.1, True, 0.5),  # nothing left to halve
        StepResult(overflow, overflow, 0.1, True, 1024.0),  # the loss itself
        StepResult(loss, overflow, 0.1, True),  # ZeRO in fp32 skips too, and there it is a failure
    ):
        with pytest.raises(RunError, match="step 7"):
            check_finite(7, result)
