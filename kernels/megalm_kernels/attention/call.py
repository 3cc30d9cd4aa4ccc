"""What one call of attention asks for beside q, k and v; and which implementation can give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megalm_kernels.arguments import FLOATS, refuse

ALL = -1  # of a window's side: no bound


@dataclass(frozen=True)
class Call:
    """Checked, with the defaults filled in. Places are aligned at the end: query i of Sq stands at key i + Sk - Sq.

    left, right: how many keys before and after its own place a query sees; ALL: all of them. Causal is right = 0.
    origin: (sequence, head, query, key) of this call's first element in the whole matrix of scores. Only dropout depends on it:
    so a rank that has some of the heads, or a tile of the rows, drops what the whole would drop there.
    """

    left: int
    right: int
    scale: float
    softcap: float = 0.0  # 0: none
    alibi_slopes: Tensor | None = None  # (H,) or (B, H) fp32
    sinks: Tensor | None = None  # (H,)
    dropout_p: float = 0.0
    seed: int = 0
    origin: tuple[int, int, int, int] = (0, 0, 0, 0)
    cu_seqlens_q: Tensor | None = None  # (N + 1,) int32
    cu_seqlens_k: Tensor | None = None
    deterministic: bool = True
    return_lse: bool = False

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def causal(self) -> bool:
        """Whether its mask is the plain causal one."""
        return self.left == ALL and self.right == 0

    @property
    def windowed(self) -> bool:
        return self.left != ALL or self.right > 0


# feature: what it is called in errors and docs -> whether a call asks for it
FEATURES: dict[str, Callable[[Call], bool]] = {
    "causal": lambda call: call.right == 0,
    "packed sequences": lambda call: call.packed,
    "a sliding window": lambda call: call.windowed,
    "ALiBi": lambda call: call.alibi_slopes is not None,
    "softcap": lambda call: call.softcap > 0,
    "sinks": lambda call: call.sinks is not None,
    "dropout": lambda call: call.dropout_p > 0,
    "return_lse": lambda call: call.return_lse,
    "deterministic gradients": lambda call: call.deterministic,
}

# implementation or fast path -> the names in FEATURES that it has, and "gradients"
SUPPORT: dict[str, frozenset[str]] = {
    "triton": frozenset((*FEATURES, "gradients")),
    "sdpa": frozenset(
        ("causal", "packed sequences", "a sliding window", "ALiBi", "return_lse", "deterministic gradients", "gradients")
    ),
    "cudnn": frozenset(("causal", "packed sequences", "gradients")),
    "reference": frozenset((*FEATURES, "gradients")),
    "hopper": frozenset(("causal", "return_lse", "deterministic gradients", "gradients")),  # triton's forward on sm_90
    "decode": frozenset(FEATURES) - {"packed sequences", "dropout", "return_lse", "deterministic gradients"},  # decode_attention
}
CPU_ONLY = {"sdpa": frozenset(("return_lse", "deterministic gradients"))}  # of what SUPPORT says
DTYPES: dict[str, tuple[torch.dtype, ...]] = {  # others: FLOATS
    "triton": FLOATS[:3],
    "cudnn": (torch.float16, torch.bfloat16),
    "hopper": (torch.float16, torch.bfloat16),
    "decode": FLOATS[:3],
}


def has(implementation: str, feature: str, device_type: str) -> bool:
    """Whether an implementation has a feature there."""
    elsewhere = device_type != "cpu" and feature in CPU_ONLY.get(implementation, ())
    return feature in SUPPORT[implementation] and not elsewhere


def lacking(implementation: str, q: Tensor, call: Call) -> str:
    """The first feature or the dtype that the call asks for and the implementation does not have there; '' if it has all.

    That gradients repeat to the bit is a wish, which nobody is refused: torch's own on a GPU repeat only under
    `torch.use_deterministic_algorithms(True)`.
    """
    for feature, asks in FEATURES.items():
        if feature != "deterministic gradients" and asks(call) and not has(implementation, feature, q.device.type):
            return feature
    return "" if q.dtype in DTYPES.get(implementation, FLOATS) else f"{q.dtype}"


def check_support(implementation: str, q: Tensor, call: Call) -> None:
    """Raises ValueError if the implementation does not have what the call asks for, with those that have."""
    what = lacking(implementation, q, call)
    if not what:
        return
    name = f"attention with {implementation}"
    if what not in FEATURES:
        wanted = " or ".join(str(dtype) for dtype in DTYPES[implementation])
        raise refuse(name, "the dtype of q", what, f"{wanted} (others: {_remedy('sdpa')})")
    others = [other for other in ("triton", "reference") if has(other, what, q.device.type)]
    have = f"{' and '.join(others)} {'have' if len(others) > 1 else 'has'} it"
    raise refuse(name, what, "not there", f"a call without it ({have}: {_remedy('reference')})")


def _remedy(implementation: str) -> str:
    return f"kernels.attention={implementation} or use(attention='{implementation}')"


def visible(queries: int, keys: int, call: Call, device: torch.device) -> Tensor:
    """(Sq, Sk) bool of one sequence: True where the query may look."""
    ahead = torch.arange(keys, device=device) - (torch.arange(queries, device=device)[:, None] + keys - queries)
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if call.right != ALL:
        seen &= ahead <= call.right
    if call.left != ALL:
        seen &= ahead >= -call.left
    return seen


def alibi_bias(queries: int, keys: int, slopes: Tensor) -> Tensor:
    """-slope |distance|: slopes (..., H) -> (..., H, Sq, Sk) (Press et al. 2021)."""
    place = torch.arange(queries, device=slopes.device)[:, None] + keys - queries
    distance = (torch.arange(keys, device=slopes.device) - place).abs()
    return -slopes[..., None, None] * distance
