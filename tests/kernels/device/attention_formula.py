"""Attention written out, in the dtype it is given: what the kernels are compared with. It shares no line with the package.

The package's own reference is another writing of the same; test_attention_features.py compares the two in fp64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megalm_kernels import flash_attention
from megalm_kernels.attention.philox import keep_mask

NOTHING = -7.0  # stands for the lse of a row that sees no key, so that the rest can be compared by numbers
Features = dict[str, Any]


def formula(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, **features: Any) -> tuple[Tensor, Tensor]:
    """Result and lse. The features are those of flash_attention; shapes (B, S, H, D), or (T, H, D) with cu_seqlens."""
    features.pop("deterministic", None)
    of_q, of_k = features.pop("cu_seqlens_q", None), features.pop("cu_seqlens_k", None)
    if of_q is None:
        return _of_batch(q, k, v, sinks, **features)
    outs, lses = [q[:0]], [q[:0, :, 0].t()]
    slopes, first = features.pop("alibi_slopes", None), features.pop("origin", (0, 0, 0, 0))
    for n in range(len(of_q) - 1):
        features["alibi_slopes"] = slopes[n] if slopes is not None and slopes.dim() == 2 else slopes
        features["origin"] = (first[0] + n, *first[1:])
        document = [x[None, a[n] : a[n + 1]] for x, a in ((q, of_q), (k, of_k), (v, of_k))]
        out, lse = _of_batch(*document, sinks, **features)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def _of_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    *,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    origin: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> tuple[Tensor, Tensor]:
    (batch, queries, heads, width), (_, keys, groups, _) = q.shape, k.shape
    many = torch.arange(heads, device=q.device) // (heads // groups)  # which head of k and v each head of q uses
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k[:, :, many]) * (width**-0.5 if scale is None else scale)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    place = torch.arange(queries, device=q.device) + keys - queries
    ahead = torch.arange(keys, device=q.device)[None] - place[:, None]  # by how many keys a key is ahead of its query
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(q.dtype)[..., None, None] * ahead.abs()
    left, right = window
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if causal:
        hidden |= ahead > 0
    if right >= 0:
        hidden |= ahead > right
    if left >= 0:
        hidden |= ahead < -left
    scores = scores.masked_fill(hidden, -torch.inf)
    blind = hidden.all(1)  # a row that sees nothing looks at one more column, which is empty: so no NaN is made
    spare = torch.where(blind, 0.0, -torch.inf).to(q.dtype) if sinks is None else sinks[:, None]
    scores = torch.cat((scores, spare.expand(batch, heads, queries)[..., None]), dim=-1)
    shares = scores.softmax(-1)[..., :-1]
    if dropout_p:
        keep = keep_mask(dropout_p, seed, origin, (batch, heads, queries, keys), q.device)
        shares = shares * keep.to(q.dtype) / (1 - dropout_p)
    lse = scores.logsumexp(-1)
    if sinks is None:
        lse = lse.masked_fill(blind, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", shares, v[:, :, many]), lse


def tensors(
    lengths: tuple[int, int],
    heads: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int = 2,
    sinks: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v and, if wanted, sinks. lengths (Sq, Sk), heads (H, Hkv); batch 0: packed."""
    generator = torch.Generator().manual_seed(seed + 1000 * sum(lengths) + width)
    first = (batch,) if batch else ()
    shapes = [(*first, lengths[i], heads[i], width) for i in (0, 1, 1)]
    shapes += [(heads[0],)] * sinks
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def starts(lengths: Iterable[int], device: torch.device) -> Tensor:
    """cu_seqlens of documents of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def same_as_formula(judge: Any, inputs: Sequence[Tensor], floor: float = 0.0, **features: Any) -> None:
    """Result, lse and all gradients, with a gradient that comes through the lse; lse closely in any dtype.

    inputs: q, k, v and sinks or not. What is chosen runs ("triton", which a fixture has seen to).
    """
    dtype = inputs[0].dtype
    floor = floor or (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    last: list[Tensor] = []

    def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> list[Tensor]:
        out, lse = flash_attention(q, k, v, sinks=sinks, return_lse=True, **features)
        assert lse.dtype == torch.float32 and out.dtype == q.dtype
        last[:] = [_numbers(lse)]
        return [out, *last]

    def plain(*inputs: Tensor) -> list[Tensor]:
        out, lse = formula(*inputs, **features)
        return [out, _numbers(lse)]

    judge(ours, plain, inputs, floor)
    close_lse(last[0].detach(), plain(*(x.detach().double() for x in inputs))[1])


def close_lse(lse: Tensor, exact: Tensor) -> None:
    """Scores are summed up in fp32, whatever the inputs are: so the lse is exact to fp32."""
    if exact.numel():
        error, largest = (lse.double() - exact).abs().max().item(), max(1.0, exact.abs().max().item())
        assert error <= 2e-6 * largest, f"lse: off by {error:.3g}, largest {largest:.3g}"


def _numbers(lse: Tensor) -> Tensor:
    assert not (lse == NOTHING).any()
    return lse.masked_fill(lse == -torch.inf, NOTHING)


def covering(factors: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few combinations, one value of each factor, in which any two values of two factors meet."""
    names = list(factors)
    order = [(a, i, b, j) for n, a in enumerate(names) for b in names[n + 1 :] for i in _of(factors, a) for j in _of(factors, b)]
    left, found = dict.fromkeys(order), []
    while left:
        a, i, b, j = next(iter(left))
        row = {a: i, b: j}
        for name in names:
            if name not in row:
                row[name] = max(_of(factors, name), key=lambda i, name=name, row=dict(row): _meet(left, row, name, i))
        for pair in [(a, i, b, j) for a, i, b, j in left if (row[a], row[b]) == (i, j)]:
            del left[pair]
        found.append({name: factors[name][row[name]] for name in names})
    return found


def _of(factors: dict[str, Sequence[Any]], name: str) -> range:
    return range(len(factors[name]))


def _meet(left: dict[tuple, None], row: dict[str, int], name: str, value: int) -> int:
    """How many pairs, of those that are left, `name` = value makes with what is in the row."""
    return sum(((name, value, a, i) in left) + ((a, i, name, value) in left) for a, i in row.items())
