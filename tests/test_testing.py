"""Results of ranks reach the test whatever they are and however late they are read."""

import time

import pytest
import torch

from megalm.testing import _collect, run_distributed

pytestmark = pytest.mark.dist


def tensor_of(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3,), float(rank))}


def function_of(rank: int, world_size: int) -> object:
    return lambda: rank


def test_a_tensor_is_read_after_its_rank_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*args: object) -> list:
        time.sleep(5)
        return _collect(*args)

    monkeypatch.setattr("megalm.testing._collect", late)
    results = run_distributed(tensor_of, 2, timeout_seconds=10)
    assert [seen["weight"].tolist() for seen in results] == [[0.0] * 3, [1.0] * 3]


def test_a_result_that_cannot_be_sent_says_so() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank . of 2 failed:.*pickle"):
        run_distributed(function_of, 2, timeout_seconds=20)
