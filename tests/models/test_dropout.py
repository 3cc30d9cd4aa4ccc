"""The dropout mask: its rate, its independence of every part of the key, its equality on slices, and its frozen bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.models.dropout import keep_mask
from megalm.models.layers import Dropout

FROZEN = ["1111011011100100", "0100000010100010", "1101001000100010", "0000101010011110", "1101101111000011", "0111001010000011"]
BASE = dict(seed=1, site=0, samples=torch.arange(4), positions=torch.arange(64))
SHIFTS = [1, 2, 3, 64, 1000, 1_000_003, 2**20, 2**31]


def mask(seed: int = 1, site: int = 0, samples: Any = 4, positions: Any = 64, channels: int = 256, p: float = 0.5) -> Tensor:
    """A mask; a number of samples or positions means the first ones."""
    rows, columns = (torch.arange(x) if isinstance(x, int) else torch.as_tensor(x) for x in (samples, positions))
    return keep_mask(seed, site, rows, columns, channels, p)


@pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.5, 0.9, 0.99])
def test_keep_rate(p: float) -> None:
    found = mask(samples=16, p=p)
    sigma = math.sqrt(p * (1 - p) / found.numel())
    assert abs(float(found.double().mean()) - (1 - p)) <= 5 * sigma


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_rate_is_the_same_everywhere(dim: int) -> None:
    """No sample, position or channel is dropped more than chance allows."""
    found = mask(samples=32, positions=128, channels=128, p=0.3).double()
    rates = found.mean([d for d in range(3) if d != dim])
    sigma = math.sqrt(0.3 * 0.7 * len(rates) / found.numel())
    assert float((rates - 0.7).abs().max()) < 5 * sigma


def agreement(a: Tensor, b: Tensor) -> float:
    """Distance of the share of equal elements from one half, in standard deviations; p = 0.5."""
    return abs(float((a == b).double().mean()) - 0.5) * 2 * math.sqrt(a.numel())


@pytest.mark.parametrize("key", BASE)
@pytest.mark.parametrize("shift", SHIFTS)
def test_independent_of(key: str, shift: int) -> None:
    """Any change of one part of the key gives an unrelated mask."""
    changed = mask(**{**BASE, key: BASE[key] + shift})  # type: ignore[arg-type, operator]
    assert agreement(mask(**BASE)[:, 0], changed[:, 0]) < 5  # type: ignore[arg-type]
    if key != "positions":
        assert agreement(mask(**BASE), changed) < 5  # type: ignore[arg-type]


@pytest.mark.parametrize("shift", [1, 2, 7, 64])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_neighbours_are_unrelated(dim: int, shift: int) -> None:
    found = mask(samples=80, positions=80, channels=80)
    length = 80 - shift
    assert agreement(found.narrow(dim, 0, length), found.narrow(dim, shift, length)) < 5


def test_sites_and_seeds_do_not_stand_in_for_each_other() -> None:
    masks = [mask(seed=s, site=t, samples=1, positions=8, channels=64) for s in range(20) for t in range(20)]
    assert len({tuple(m.flatten().tolist()) for m in masks}) == 400


def test_same_on_slices() -> None:
    """A rank that holds some samples and a slice of the sequence draws what one rank would draw."""
    whole = mask(samples=8, positions=16, p=0.2)
    for rows in (slice(0, 4), slice(4, 8), slice(5, 6)):
        for columns in (slice(0, 8), slice(8, 16), slice(3, 5)):
            part = mask(samples=torch.arange(8)[rows], positions=torch.arange(16)[columns], p=0.2)
            assert torch.equal(part, whole[rows, columns])


def test_frozen_bits() -> None:
    """The masks of a run must not change from version to version, or a resumed run is another run."""
    found = mask(seed=1234, site=5, samples=[0, 1, 123_456_789], positions=[0, 7], channels=16)
    assert ["".join("01"[int(x)] for x in row) for row in found.flatten(0, 1)] == FROZEN


def test_against_splitmix64_in_python_integers() -> None:
    """The int64 arithmetic wraps around and shifts as unsigned numbers do."""
    wrap = 2**64

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % wrap
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % wrap
        return x ^ (x >> 31)

    golden, seed, site, sample, position = 0x9E3779B97F4A7C15, 2**40 + 17, 9, 2**33 + 1, 4095
    row = mix((mix((sample * golden + seed * 1_000_003 + site) % wrap) + position * golden) % wrap)
    expected = [mix((row + c * golden) % wrap) % 2**24 >= int(0.3 * 2**24) for c in range(64)]
    assert mask(seed, site, [sample], [position], 64, 0.3).flatten().tolist() == expected


def test_module_scales_what_it_keeps() -> None:
    dropout, x = Dropout(0.25, site=3), torch.randn(4, 8, 32)
    dropout.seed = 11
    keep = mask(11, 3, 4, 8, 32, 0.25)
    y = dropout(x, torch.arange(4), torch.arange(8))
    assert torch.equal(y == 0, ~keep)
    torch.testing.assert_close(y[keep], x[keep] / 0.75)
    ones = Dropout(0.25, site=0)(torch.ones(64, 64, 64), torch.arange(64), torch.arange(64))
    assert float(ones.mean()) == pytest.approx(1, abs=0.01)


def test_module_in_evaluation_or_without_probability_does_nothing() -> None:
    x = torch.randn(2, 3, 4)
    assert Dropout(0.5, 0).eval()(x, None, torch.arange(3)) is x
    assert Dropout(0.0, 0)(x, None, torch.arange(3)) is x
    with pytest.raises(AssertionError, match="samples"):
        Dropout(0.5, 0)(x, None, torch.arange(3))


def test_module_on_a_sequence_slice() -> None:
    whole, x = Dropout(0.5, site=1), torch.randn(2, 8, 16)
    samples, positions = torch.tensor([3, 9]), torch.arange(8)
    expected = whole(x, samples, positions)
    for index in range(4):
        part = Dropout(0.5, site=1)
        part.sequence_slice = (index, 4)
        rows = slice(2 * index, 2 * index + 2)
        assert torch.equal(part(x[:, rows], samples, positions), expected[:, rows])
