"""More elements than int32 counts, on any machine: memory that is only promised, and of the programs the last ones only.

On a GPU the buffers are real and all programs run. Each case runs in a process of its own, of which a wrong address is the end.
"""

from __future__ import annotations

import mmap
import subprocess
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

COUNT = 2**31 + 2**14


def run_far(module: str, function: str, device: torch.device) -> None:
    """`function(device)` of a test module in a new process; it must come to its end."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; from {module} import {function}; import torch; "
    code += f"{function}(torch.device('{device.type}')); print('reached the end')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "reached the end" in done.stdout, f"exit {done.returncode}\n{done.stderr[-2000:]}"


def zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that, on a CPU, take memory only where they are written."""
    if device.type != "cpu":
        return torch.zeros(count, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, dtype.itemsize * count, flags=flags), dtype=dtype)


def run_last_programs(module: ModuleType, device: torch.device) -> None:
    """In the interpreter, for the rest of this process: of each launch of `module` (of millions of programs) the last."""
    if device.type != "cpu":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def launch_last(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        last = interpreter.TensorHandle(np.array([grid[0] - 1], dtype=np.int32), tl.int32)
        interpreter.InterpreterBuilder.create_get_program_id = lambda self, axis: last
        kernel[(1,)](*args, **meta)

    module.launch = launch_last  # type: ignore[attr-defined]
