"""Which tokens may be drawn, exactly, and how often each is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.inference.sampling import draw_token, filter_logits

SHARES = [0.05, 0.4, 0.1, 0.25, 0.2]  # in no order
LOGITS = torch.tensor([SHARES]).log()


def allowed(logits: torch.Tensor = LOGITS, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> list[set[int]]:
    """The tokens of each row that may be drawn."""
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in filter_logits(logits, temperature, top_k, top_p)]


@pytest.mark.parametrize(
    ("top_k", "expected"), [(0, {0, 1, 2, 3, 4}), (1, {1}), (2, {1, 3}), (3, {1, 3, 4}), (4, {1, 2, 3, 4}), (9, {0, 1, 2, 3, 4})]
)
def test_top_k(top_k: int, expected: set[int]) -> None:
    assert allowed(top_k=top_k) == [expected]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(1e-6, {1}), (0.39, {1}), (0.41, {1, 3}), (0.64, {1, 3}), (0.66, {1, 3, 4}), (0.86, {1, 2, 3, 4}), (0.96, {0, 1, 2, 3, 4})],
)
def test_top_p_is_the_smallest_set_that_reaches_it(top_p: float, expected: set[int]) -> None:
    assert allowed(top_p=top_p) == [expected]


def test_top_k_comes_first_and_top_p_counts_what_is_left() -> None:
    assert allowed(top_k=2, top_p=0.6) == [{1}]  # of the two, token 1 has 0.4 / 0.65 = 0.615
    assert allowed(top_k=2, top_p=0.62) == [{1, 3}]


def test_temperature_comes_before_top_p() -> None:
    assert allowed(top_p=0.5) == [{1, 3}]
    assert allowed(top_p=0.5, temperature=0.5) == [{1}]  # the shares' squares: 0.16 of 0.275


def test_equal_logits_do_not_let_more_than_k_through() -> None:
    assert [len(tokens) for tokens in allowed(torch.zeros(3, 8), top_k=3)] == [3, 3, 3]


def test_rows_are_filtered_one_by_one() -> None:
    both = torch.cat([LOGITS, LOGITS.flip(-1)])
    assert allowed(both, top_k=2) == [{1, 3}, {3, 1}]
    assert allowed(both, top_p=0.3) == [{1}, {3}]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12), st.integers(0, 13), st.floats(0.01, 1.0), st.floats(0.1, 3)
)
def test_against_the_definition(values: list[float], top_k: int, top_p: float, temperature: float) -> None:
    """By sorting in Python: the kept tokens are the likeliest, no fewer and no more than needed."""
    (found,) = allowed(torch.tensor([values]), temperature, top_k, top_p)
    kept = sorted((values[i] for i in found), reverse=True)
    ordered = sorted(values, reverse=True)
    assert kept == ordered[: len(kept)]
    left = ordered[: top_k or None]
    weights = [math.exp((value - left[0]) / temperature) for value in left]
    shares = [weight / sum(weights) for weight in weights]
    assert 1 <= len(kept) <= len(left)
    assert sum(shares[: len(kept) - 1]) < top_p + 1e-5, "one fewer would not have reached top_p"
    if top_p < 1:
        assert sum(shares[: len(kept)]) > top_p - 1e-5, "top_p is reached"
    else:
        assert len(kept) == len(left)


def test_greedy_takes_the_likeliest_and_looks_at_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    tokens = draw_token(torch.cat([LOGITS, LOGITS.flip(-1)]), True, 1e-3, 1, 0.1, generator)
    assert tokens.tolist() == [1, 3] and tokens.dtype == torch.int64
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies(temperature: float) -> None:
    """20,000 draws within five standard deviations of the tempered distribution."""
    draws, generator = 20_000, torch.Generator().manual_seed(1)
    tokens = draw_token(LOGITS.expand(draws, -1), False, temperature, 0, 1.0, generator)
    weights = [share ** (1 / temperature) for share in SHARES]
    for token, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs(int((tokens == token).sum()) - draws * p) < 5 * math.sqrt(draws * p * (1 - p))


def test_the_seed_decides() -> None:
    def draw(seed: int) -> list[int]:
        return draw_token(torch.zeros(50, 100), False, 1.0, 0, 1.0, torch.Generator().manual_seed(seed)).tolist()

    assert draw(3) == draw(3) != draw(4)


def test_what_is_filtered_out_is_never_drawn() -> None:
    tokens = draw_token(LOGITS.expand(5000, -1), False, 5.0, 3, 0.99, torch.Generator().manual_seed(0))
    assert set(tokens.tolist()) == {1, 3, 4}
