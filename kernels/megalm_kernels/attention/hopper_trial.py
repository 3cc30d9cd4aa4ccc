"""What the warp-specialised kernel has to show before it is used; run in a process of its own, which may hang or die.

    python -m megalm_kernels.attention.hopper_trial <number of the GPU> <seconds>

prints two lines of JSON: {"started": true} when all kernels are compiled and before one is launched, and at the end
{"fault": "..."}, empty if the kernel is right. Exit code CANNOT_TELL: the trial itself could not be made, for want of memory or
of a GPU that takes another process.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalm_kernels.attention.call import ALL, Call
from megalm_kernels.attention.hopper import ARCH, CANNOT_TELL, STARTED
from megalm_kernels.attention.reference import attention_reference
from megalm_kernels.launch import OPTIONS, capture

REPEATS = 3
_BYTES = 1 << 30  # of GPU memory for a trial: mostly the fp64 scores of one head of k
_LSE_ERROR = 1e-3  # of numbers around 10: scores are sums in fp32, in tensor cores that cut instead of rounding

Forward = Callable[[Tensor, Tensor, Tensor, int, int, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """One call. Sizes: of the batch, queries, keys, heads, heads of k and v, and the width of a head."""

    sizes: tuple[int, int, int, int, int, int]
    causal: bool
    dtype: torch.dtype = torch.bfloat16

    @property
    def call(self) -> Call:
        return Call(ALL, 0 if self.causal else ALL, self.sizes[-1] ** -0.5)


CASES = (  # enough programs to fill a GPU, and enough blocks of keys to go round the rings
    Case((2, 1024, 1024, 16, 4, 128), True),
    Case((2, 1152, 1152, 16, 16, 64), True),
    Case((1, 384, 1408, 48, 6, 64), True, torch.float16),
    Case((3, 256, 896, 24, 24, 128), False, torch.float16),
    Case((2, 640, 1280, 16, 2, 64), False),
    Case((1, 128, 128, 8, 8, 128), True),
)


def find_fault(forward: Forward, device: torch.device, cases: Sequence[Case] = CASES, repeats: int = REPEATS) -> str:
    """The first thing that is wrong with `forward`, or ''. Besides against the formula it is held against itself, to the bit."""
    return next((fault for case in cases for fault in _faults(forward, make(case, device), case, repeats)), "")


def prepare(forward: Forward, device: torch.device, cases: Sequence[Case] = CASES) -> None:
    """Have what the cases launch compiled and loaded, and launch nothing: what hangs after that hangs in the kernel."""
    with capture(ARCH) as launches:
        for case in cases:
            forward(*make(case, device), case.call.left, case.call.right, case.call.scale)
    for each in launches:
        kernel = each.kernel.warmup(*each.args, grid=each.grid, **each.meta, **OPTIONS)
        _ = kernel.run  # Triton loads a kernel, and 3.6 has gcc make its launcher, when this is first asked for


def make(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v; the scores are wide apart, so that a wrong block of keys is not lost in the mean of many."""
    batch, queries, keys, heads, kv_heads, channels = case.sizes
    generator = torch.Generator(device).manual_seed(queries + keys + channels)

    def tensor(length: int, heads: int) -> Tensor:
        return torch.randn(batch, length, heads, channels, generator=generator, device=device)

    q, k, v = 3 * tensor(queries, heads), tensor(keys, kv_heads), tensor(keys, kv_heads)
    return q.to(case.dtype), k.to(case.dtype), v.to(case.dtype)


def _faults(forward: Forward, inputs: tuple[Tensor, Tensor, Tensor], case: Case, repeats: int) -> Iterator[str]:
    q, k, v = inputs
    call = case.call
    out, lse = forward(q, k, v, call.left, call.right, call.scale)
    for _ in range(repeats - 1):
        again = forward(q, k, v, call.left, call.right, call.scale)
        if not (torch.equal(out, again[0]) and torch.equal(lse, again[1])):
            yield f"{case}: a second run gave other bits"
    groups = q.shape[2] // k.shape[2]
    for head in range(k.shape[2]):  # one at a time: the formula has the whole matrix of scores, in fp64
        some = slice(head * groups, (head + 1) * groups)
        wide = q[:, :, some].double(), k[:, :, head : head + 1].double(), v[:, :, head : head + 1].double()
        want, want_lse = attention_reference(*wide, call)
        size, _ = attention_reference(*wide[:2], wide[2].abs(), call)
        # A share of the softmax is rounded to the dtype, and so is the result: each by eps / 2 at the most.
        allowed = 1.5 * torch.finfo(q.dtype).eps * size + 1e-4
        error = (out[:, :, some].double() - want).abs()
        if not bool((error <= allowed).all()):
            yield f"{case}: off by {error.max().item():.3g} in head {head} of k"
        lse_error = (lse[:, some].double() - want_lse).abs().max().item()
        if not lse_error <= _LSE_ERROR:
            yield f"{case}: lse off by {lse_error:.3g} in head {head} of k"


def main(number: str, seconds: str) -> int:
    """The exit code. After `seconds` the process ends, whatever it waits for: its parent may be gone by then."""
    signal.alarm(int(seconds))
    device = torch.device("cuda", int(number))
    try:
        torch.cuda.set_device(device)
        torch.empty(_BYTES, dtype=torch.uint8, device=device)  # torch keeps it, and gives from it
    except RuntimeError as error:  # out of memory is one
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        return CANNOT_TELL
    from megalm_kernels.device.attention_hopper import forward

    prepare(forward, device)
    print(STARTED, flush=True)
    print(json.dumps({"fault": find_fault(forward, device)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
